// Scores of a tile, [slot][4], times a factor a slot. Factors lie anywhere: each goes straight from memory into its lanes.

// The factors of as many slots as a vector holds, [slot][4].
template <class Scale>
static inline Vec slot_factors(Scale scale, int t) {
#if LANES == 16
  __m512 x = _mm512_set1_ps(*scale(t));
  x = _mm512_mask_broadcastss_ps(x, 0x00f0, _mm_load_ss(scale(t + 1)));
  x = _mm512_mask_broadcastss_ps(x, 0x0f00, _mm_load_ss(scale(t + 2)));
  return reinterpret_cast<Vec>(_mm512_mask_broadcastss_ps(x, 0xf000, _mm_load_ss(scale(t + 3))));
#elif LANES == 8
  return reinterpret_cast<Vec>(_mm256_set_m128(_mm_set1_ps(*scale(t + 1)), _mm_set1_ps(*scale(t))));
#else
  return splat(*scale(t));
#endif
}

template <class Scale>
static inline void scale_scores(float* scores, int count, Scale scale) {  // `scale` says where a slot's factor lies
  constexpr int SLOTS = LANES / 4;
  int t = 0;
  for (; t + SLOTS <= count; t += SLOTS) store(scores + t * 4, load(scores + t * 4) * slot_factors(scale, t));
  for (; t < count; ++t)
    for (int q = 0; q < 4; ++q) scores[t * 4 + q] *= *scale(t);
}

// The same by a factor for each slot of a tile, `step` apart in memory.
template <class T>
static void scale_tile(const Head<T>& head, const Tile& tile, const float* scale, int64_t step, float* scores) {
  const float* first = scale + tile.entry[0] * step;
  if (!head.index && tile.entry[tile.count - 1] - tile.entry[0] == tile.count - 1)
    scale_scores(scores, tile.count, [&](int t) { return first + t * step; });
  else
    scale_scores(scores, tile.count, [&](int t) { return scale + head.slot_of(tile, t) * step; });
}
