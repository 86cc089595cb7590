// What Python hands over: addresses, sizes, and strides counted in elements. A null address means "not given".
#pragma once
#include <cstdint>

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

enum Kind : int64_t { FP32 = 0, BF16 = 1, FP16 = 2, INT8 = 3 };

enum Reduction : int64_t { NONE = 0, SUM = 1, MEAN = 2, MAX = 3 };

// The slots of all (batch row, KV head) pairs, in either layout of kvpress.kernels.shapes.
struct Slots {
  const void* keys;
  const void* values;
  int64_t kind;
  int64_t dim, value_dim;
  int64_t slots;                                     // dense: of every head; flat: positions given for each head
  int64_t key_batch, key_head, key_slot;             // strides; flat: only key_slot
  int64_t value_batch, value_head, value_slot;
  const float* key_scale;                            // int8: one factor a slot
  const float* value_scale;
  int64_t scale_batch, scale_head;                   // the same for both; slots lie side by side
  const int64_t* positions;
  int64_t position_batch, position_head;             // slots lie side by side
  const int64_t* starts;                             // flat: [batch * kv_heads], contiguous
  const int64_t* lengths;
  int64_t flat_rows;                                 // rows of the flat buffer
  const int64_t* index;
  int64_t index_batch, index_head, index_count;      // entries lie side by side
};

struct Attention {
  int64_t threads;
  int64_t batch, query_heads, kv_heads, rows;
  const void* query;
  int64_t query_kind, query_batch, query_head, query_row;
  Slots slots;
  const int64_t* query_positions;
  int64_t query_position_batch;                      // rows lie side by side
  double scaling, softcap;                           // softcap 0: none
  const float* sinks;
  void* output;                                      // [batch, query_heads, rows, value_dim], contiguous, of query_kind
  float* lse;                                        // [batch, query_heads, rows], contiguous, or null
  float* weights;                                    // [batch, kv_heads, entries], contiguous, or null (rows == 1 only)
  int64_t weights_reduction;
  int64_t weights_entries;                           // a head, as the caller allocated them
};

enum Status : int { OK = 0, OUT_OF_MEMORY = 1, INDEX_OUT_OF_RANGE = 2, FLAT_OUT_OF_RANGE = 3 };

struct Level {  // the operations compiled for one instruction set
  int (*attention)(const Attention&);
};
