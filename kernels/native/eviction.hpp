#pragma once
#include "arguments.hpp"

// The end of a decoded token at position `newest`: it is in the slots that `e` names, and attention left it `weights [batch, heads, slots]`,
// or null where there is no column. Leaves in their place the slots to evict.
int evict(const Eviction& e, int64_t newest, const float* weights);
