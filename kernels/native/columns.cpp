// Moves of slots, which need no arithmetic and no instruction set: gather survivors, overwrite one slot, find the weakest.
#include "columns.hpp"

#include <cstring>
#if defined(_OPENMP)
#include <omp.h>
#endif

int gather(const Gather& g) {
  int wrong = 0;
  const int64_t rows = g.batch * g.heads * g.kept;
#pragma omp parallel for schedule(static) num_threads(int(g.threads)) if (g.threads > 1 && rows * g.bytes > 262144) \
    reduction(| : wrong)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t place = row % g.kept, h = row / g.kept % g.heads, b = row / g.kept / g.heads;
    const int64_t slot = g.index[b * g.index_batch + h * g.index_head + place];
    char* to = g.output + row * g.bytes;
    if (slot < 0) {
      std::memset(to, 0, size_t(g.bytes));
    } else if (slot >= g.slots) {
      wrong |= 1;
    } else {
      std::memcpy(to, g.source + b * g.batch_stride + h * g.head_stride + slot * g.slot_stride, size_t(g.bytes));
    }
  }
  return wrong ? INDEX_OUT_OF_RANGE : OK;
}

int overwrite(const Overwrite& o) {
  for (int64_t i = 0; i < o.batch * o.heads; ++i) {
    const int64_t slot = o.slot ? o.slot[i] : o.same, row = o.starts ? o.starts[i] + slot : slot;
    if (slot < 0 || row < 0 || row >= o.slots) return INDEX_OUT_OF_RANGE;  // before anything is written
  }
  for (int64_t i = 0; i < o.batch * o.heads; ++i) {
    const int64_t b = i / o.heads, h = i % o.heads, slot = o.slot ? o.slot[i] : o.same;
    const int64_t row = o.starts ? o.starts[i] + slot : slot;
    std::memcpy(o.column + b * o.batch_stride + h * o.head_stride + row * o.slot_stride,
                o.source + b * o.source_batch + h * o.source_head, size_t(o.bytes));
  }
  return OK;
}

namespace {

// Classes before scores: an empty slot goes first, a protected one last.
enum Class { EMPTY, PLAIN, PROTECTED, NONE_YET };

template <class P>
int64_t weakest_of(const Weakest& w, int64_t i, const float* scores, const P* positions) {
  const int64_t length = w.lengths ? w.lengths[i] : w.slots;
  const int64_t sinks = w.sinks ? w.sinks[i] : w.all_sinks, recent = w.recent ? w.recent[i] : w.all_recent;
  const int64_t low = sinks > 0 ? sinks : 0;
  constexpr float LARGEST = 3.4028234663852886e38f;
  int best_class = NONE_YET;
  float best_score = 0;
  int64_t best_position = 0, best = -1;
  for (int64_t t = 0; t < length; ++t) {
    const int64_t position = positions[t];
    // the common slot: plain, and better than the weakest so far
    if (best_class == PLAIN && scores[t] > best_score && best_score < LARGEST && position >= low && position < recent)
      continue;
    const int here = position < 0 ? EMPTY : (position < sinks || position >= recent ? PROTECTED : PLAIN);
    float score = 0;
    if (here == PLAIN) {
      score = scores[t];
      score = score != score || score < -LARGEST ? -LARGEST : (score > LARGEST ? LARGEST : score);
    }
    if (here > best_class || (here == best_class && score > best_score)) continue;
    if (here == best_class && score == best_score && position >= best_position) continue;
    best_class = here;
    best_score = score;
    best_position = position;
    best = t;
  }
  return best;
}

}  // namespace

int weakest(const Weakest& w) {
  for (int64_t i = 0; i < w.batch * w.heads; ++i) {
    const int64_t b = i / w.heads, h = i % w.heads, at = b * w.position_batch + h * w.position_head;
    const float* scores = w.scores + b * w.score_batch + h * w.score_head;
    w.slot[i] = w.position_bytes == 4 ? weakest_of(w, i, scores, static_cast<const int32_t*>(w.positions) + at)
                                      : weakest_of(w, i, scores, static_cast<const int64_t*>(w.positions) + at);
  }
  return OK;
}
