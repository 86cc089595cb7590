// What Python hands over: addresses, sizes, and strides counted in elements. A null address means "not given".
#pragma once
#include <cstdint>

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };
template <bool VNNI>  // whether the machine adds products of bytes in one instruction
struct Int4 {
  static constexpr int CHANNELS = 2;
  uint8_t pair;  // two channels; strides count pairs
};
template <bool VNNI>
struct Int8 {  // int8 that is multiplied by integers
  static constexpr int CHANNELS = 1;
  int8_t code;
};

enum Kind : int64_t { FP32 = 0, BF16 = 1, FP16 = 2, INT8 = 3, INT4 = 4 };

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
  const float* key_scale;                            // int8 and int4: one factor a slot
  const float* value_scale;
  int64_t key_scale_batch, key_scale_head, key_scale_slot;  // flat: only key_scale_slot
  int64_t value_scale_batch, value_scale_head, value_scale_slot;
  const void* positions;
  int64_t position_bytes;                            // 4 or 8: the size of one
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
  int64_t causal;                                    // not 0: the rows are the last slots, in order; no positions are given
  double scaling, softcap;                           // softcap 0: none
  const float* sinks;
  const float* cosine;                               // keys are turned by their entry as they are read, or null
  const float* sine;
  int64_t rotary, table_rows, table_row;             // channels turned; rows of both tables, and their stride
  void* output;                                      // [batch, query_heads, rows, value_dim], contiguous, of query_kind
  float* lse;                                        // [batch, query_heads, rows], contiguous, or null
  float* weights;                                    // [batch, kv_heads, entries], contiguous, or null (rows == 1 only)
  int64_t weights_reduction;
  int64_t weights_entries;                           // a head, as the caller allocated them
};

struct Mass {
  Attention attention;   // lse: given, or null; weights: the mass [batch, query_heads, weights_entries]; no output
  double temperature;
  int64_t noise, seed;   // noise not 0: Gumbel noise from `seed`
  const float* row_weights;  // [batch or 1, rows], or null
  int64_t row_weights_batch;
};

struct Vote {
  Attention attention;   // one row; weights: the votes [batch, weights_entries], or the products [batch, kv_heads, weights_entries]; no output
};

struct PageBounds {
  int64_t threads, batch, kv_heads, slots, dim, page_size;
  const void* keys;
  int64_t kind, key_batch, key_head, key_slot;
  const void* positions;
  int64_t position_bytes, position_batch, position_head;
  void* lowest;          // [batch, kv_heads, pages, dim], contiguous, of `bound_kind`
  void* highest;
  int64_t bound_kind;
};

struct PageScores {
  int64_t threads, batch, query_heads, kv_heads, pages, dim;
  const void* query;
  int64_t query_kind, query_batch, query_head;
  const void* lowest;
  const void* highest;
  int64_t kind, low_batch, low_head, low_page, high_batch, high_head, high_page;
  float* scores;         // [batch, query_heads, pages], contiguous
};

struct Rotation {
  int64_t threads, batch, heads, slots, dim, rotary;
  const void* source;
  int64_t kind, batch_stride, head_stride, slot_stride;
  const float* cosine;   // strides of both tables; with positions only `table_slot`
  const float* sine;
  int64_t table_batch, table_head, table_slot;
  const int64_t* positions;
  int64_t position_batch, position_head, table_rows;
  double sign;           // -1 undoes a rotation
  void* output;          // [batch, heads, slots, dim] of `kind`; it may be the source
  int64_t output_batch, output_head, output_slot;
};

struct Packing {
  int64_t threads, batch, heads, slots, dim;
  const void* source;
  int64_t kind, batch_stride, head_stride, slot_stride;
  const float* centre;   // int4: [batch, heads, dim], contiguous, taken off every row, or null
  void* output;          // [batch, heads, slots, dim + 4] of int8, [batch, heads, slots, dim / 2 + 4] of int4, contiguous
};

struct Gather {          // one column: rows of `bytes` bytes
  int64_t threads, batch, heads, slots, kept, bytes;
  const char* source;
  int64_t batch_stride, head_stride, slot_stride;  // bytes
  const int64_t* index;
  int64_t index_batch, index_head;
  char* output;          // [batch, heads, kept], contiguous
};

struct Overwrite {       // one column: rows of `bytes` bytes, one new row a head
  int64_t batch, heads, slots, bytes;
  char* column;
  int64_t batch_stride, head_stride, slot_stride;  // bytes
  const int64_t* starts;                           // flat layout, else null
  const int64_t* slot;                             // [batch, heads], contiguous, or null: `same` for all
  const char* source;
  int64_t source_batch, source_head;               // bytes
  int64_t same;
};

struct Weakest {
  int64_t batch, heads, slots;
  const float* scores;
  int64_t score_batch, score_head;
  const void* positions;
  int64_t position_bytes, position_batch, position_head;
  const int64_t* lengths;      // [batch, heads] slots that exist, or null: all
  const int64_t* sinks;        // [batch, heads]: positions below are protected; null: `all_sinks`
  const int64_t* recent;       // [batch, heads]: positions from here on are protected; null: `all_recent`
  int64_t all_sinks, all_recent;
  int64_t* slot;               // [batch, heads]
};

struct Region {
  int64_t address, bytes;
};

struct BestSlots {
  int64_t threads, rows, size, count;
  const float* scores;
  int64_t stride;              // between rows
  int64_t* slots;              // [rows, count]
};

struct PageSlots {
  int64_t batch, query_heads, kv_heads, pages, count, page_size, slots;
  const float* scores;         // [batch, query_heads, pages], contiguous
  const int64_t* first;        // [batch] slot at which page 0 begins, or null: 0
  const int64_t* newest;       // [batch, kv_heads] slot of the newest token, counted from there, or null: the last slot
  int64_t* index;              // [batch, kv_heads, count * page_size]
};

struct ChoosePages {
  PageScores scores;           // its `scores` and those of `slots` are scratch
  PageSlots slots;
  void* low;                   // the bounds once more, to write to
  void* high;
  const void* key;             // of the newest token, or null: nothing to widen
  int64_t key_kind, key_batch, key_head;
  const float* key_scale;      // of an int8 key, one a head
  int64_t scale_batch, scale_head;
  int64_t page, begins;        // that it widens; whether it is the first of that page
};

struct ListedSlots {           // sinks, chosen slots and the last ones
  int64_t lists, sinks, top_k, local, slots;
  const int64_t* chosen;       // [lists, top_k], contiguous
  int64_t* index;              // [lists, sinks + top_k + local]
};

struct ReusedSlots {
  int64_t batch, query_heads, dim;
  double threshold;
  const void* query;
  int64_t kind, query_batch, query_head;
  const void* former;          // [batch, query_heads, dim], contiguous, of `kind`
  const uint8_t* live;         // [batch]
  ListedSlots listed;          // written where the selection serves once more
};

struct FindPlaces {
  int64_t lists, count, slots, rows;
  int64_t tail, base;          // the first `tail` rows hold the slots `base …` from now on, and are not given away
  int64_t vacant;              // nor as many behind them, which hold nothing from now on
  const int64_t* index;        // [lists, count], -1 for none
  int32_t* place;              // [lists, slots] the row of each slot, -1 for nowhere
  int32_t* holder;             // [lists, rows] the slot of each row, -1 for none
  int32_t* uses;               // [lists, rows] how much it was used lately
  int64_t* found;              // [lists, count]; before the call, where they might lie: what was found last, or anything
  int64_t* missing;            // how many had no row, then their entries
};

struct RowsToRead {            // of blocks of `block` slots; a batch row and KV head is a list, or a batch row alone
  int64_t lists, groups, count;  // lists of a batch row; entries of a list
  int64_t block, rows;         // slots of a block; places of a list
  int64_t missing;
  const int64_t* entries;      // [missing] of the flat `index`
  const int64_t* index;        // [lists, count] slots
  const int64_t* places;       // [lists, count]
  const int64_t* then;         // [blocks, lists / groups] which batch row of a block each batch row was, or null: the same
  int64_t blocks;
  int64_t* numbers;            // [missing] of the rows in their blocks, in the order of blocks and of rows in a block
  int64_t* targets;            // [missing] their places among all rows of all lists
  int64_t* firsts;             // [missing + 1] which of them are each block's own
  int64_t* found;              // how many blocks, then which
};

struct VotedSlots {            // of one decoded token a batch row, over slots in order
  Attention attention;         // as of Vote, of all slots from the first; tables: one row, by which the query is turned before it votes
  double threshold;            // the least cosine with the former query under which its choice serves once more
  int64_t sinks, top_k, local;
  int64_t regroup;             // not 0: query head h belongs to KV head h % kv_heads
  void* former;                // [batch, query_heads, dim], contiguous, of query_kind: the query that chose; written where one chooses anew
  uint8_t* live;               // [batch]: whether one has
  int64_t* chosen;             // [batch, top_k]
  int64_t* index;              // [batch, sinks + top_k + local]
};

struct DecodedToken {          // what differs from one token to the next
  int64_t threads;
  int64_t slot, slots;         // the one that it takes; how many there are then, or 0: as the call says
  int64_t found;               // not 0: all but attention was done before
  int64_t stored;              // not 0: key and value are as they are stored, and the key is not turned
  const int32_t* positions;    // of each batch row's; of use where an eviction is given
  int64_t position_batch;      // 0: one for all
  const void* key;             // of the token
  const void* value;
  const void* query;
  const float* cosine;         // by which the model's rotation is undone, or null
  const float* sine;
  const int64_t* index;        // a list of slots to attend to, or null: that of the call
  void* output;
};

struct Eviction {              // after a decoded token, where all slots hold tokens but the one of each head that it takes
  Weakest weakest;             // of contiguous int32 positions; `slot`: what the token takes, and then what it leaves to the next one;
                               // `recent` or `all_recent`: how many of the last tokens are protected
                               // `scores`: the column of attention received, contiguous, or null: the oldest goes
  double fade;                 // of the column, before the token's weights are added
};

enum Status : int { OK = 0, OUT_OF_MEMORY = 1, INDEX_OUT_OF_RANGE = 2, FLAT_OUT_OF_RANGE = 3 };

struct Level {  // the operations compiled for one instruction set
  int (*attention)(const Attention&);
  int (*attention_mass)(const Mass&);
  int (*head_vote)(const Vote&);
  int (*group_products)(const Vote&);
  int (*page_bounds)(const PageBounds&);
  int (*page_scores)(const PageScores&);
  int (*choose_pages)(const ChoosePages&);
  int (*rotate)(const Rotation&);
  int (*pack_int8)(const Packing&);
  int (*pack_int4)(const Packing&);
  int (*voted_slots)(const VotedSlots&, bool* anew);
};
