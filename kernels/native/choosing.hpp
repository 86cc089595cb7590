#pragma once
#include "arguments.hpp"

// Collect into `slots`, which holds `size`, which of `scores [size]` are at least `least`, ascending; how many these are.
typedef int64_t (*Collect)(const float* scores, int64_t size, float least, uint32_t* slots);
int64_t collect_any(const float* scores, int64_t size, float least, uint32_t* slots);  // without an instruction set

int best_slots(const BestSlots&);
int best_slots_by(Collect, const BestSlots&);
int page_slots(const PageSlots&);
int64_t page_scratch(const PageSlots&);  // bytes, a multiple of 8, in which one (batch row, KV head) is worked on
void page_slots_of(const PageSlots&, int64_t head, void* scratch);  // the part of one of batch * kv_heads
int listed_slots(const ListedSlots&);
bool reused_slots(const ReusedSlots&);

// The cosine of two sets of rows, all heads together, in double; no less than 1e-8 is taken for a length (as torch.cosine_similarity).
// `former` is contiguous, the heads of `query` lie `query_head` numbers apart.
double cosine_of(const void* query, int64_t query_head, const void* former, int64_t kind, int64_t heads, int64_t dim);
