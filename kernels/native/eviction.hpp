#pragma once
#include "arguments.hpp"

// The end of a decoded token, at position `newest[b * batch_stride]` of batch row b: it is in the slots that `e` names, and its attention gave
// `weights [batch, heads, slots]`, or null where there is no column. Leaves in their place the slots to evict.
int evict(const Eviction& e, const int32_t* newest, int64_t batch_stride, const float* weights);
