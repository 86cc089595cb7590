// What policies do with a decoded token that rank by the attention a slot received, or by age: column, and the slot that goes.
#include "eviction.hpp"

#include <memory>
#include <new>

#include "columns.hpp"

namespace {

// In two passes, so that no product is added unrounded.
void add_weights(float* column, const float* weights, int64_t count, float fade) {
  if (fade != 1)
    for (int64_t i = 0; i < count; ++i) column[i] *= fade;
  for (int64_t i = 0; i < count; ++i) column[i] += weights[i];
}

}  // namespace

int evict(const Eviction& e, const int32_t* newest, int64_t batch_stride, const float* weights) {
  Weakest w = e.weakest;
  const int64_t heads = w.batch * w.heads, count = heads * w.slots;
  int32_t* positions = static_cast<int32_t*>(const_cast<void*>(w.positions));
  float* column = const_cast<float*>(w.scores);
  std::unique_ptr<int64_t[]> recent(new (std::nothrow) int64_t[size_t(heads)]);
  std::unique_ptr<float[]> ages(column ? nullptr : new (std::nothrow) float[size_t(count)]);
  if (!recent || (!column && !ages)) return OUT_OF_MEMORY;
  for (int64_t i = 0; i < heads; ++i) {
    const int32_t position = newest[i / w.heads * batch_stride];
    positions[i * w.slots + w.slot[i]] = position;
    if (column) column[i * w.slots + w.slot[i]] = 0;
    recent[i] = int64_t(position) + 1 - (w.recent ? w.recent[i] : w.all_recent);
  }
  w.recent = recent.get();
  if (column) {
    add_weights(column, weights, count, float(e.fade));
  } else {
    for (int64_t i = 0; i < count; ++i) ages[i] = float(positions[i]);
    w.scores = ages.get();
  }
  return weakest(w);
}
