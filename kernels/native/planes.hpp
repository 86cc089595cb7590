// Scores of a tile's slots by the queries of one KV head, as planes: [query][slot]. What follows goes slot by slot in whole vectors,
// and no lane is lost where queries are not a multiple of four.

// [slot][4] to planes of TILE
static inline void part_queries(const float* scores, int queries, float* planes) {
  for (int q = 0; q < queries; ++q)
    for (int t = 0; t < TILE; ++t) planes[q * TILE + t] = scores[t * 4 + q];
}

// The factors of a tile's slots; past the last one they are undefined.
template <class T>
static void key_scales(const Head<T>& head, const Tile& tile, float* scale) {
  const int64_t step = head.slots.key_scale_slot;
  if (!head.index && tile.count == TILE && tile.entry[TILE - 1] - tile.entry[0] == TILE - 1) {  // slots side by side
    const float* first = head.key_scale + tile.entry[0] * step;
    for (int t = 0; t < TILE; ++t) scale[t] = first[t * step];
  } else {
    for (int t = 0; t < TILE; ++t) scale[t] = t < tile.count ? head.key_scale_of(tile, t) : 0.f;
  }
}

// planes[query][slot] of up to four queries [query][dim]; what lies past the last slot of the tile is undefined
template <class T>
static std::enable_if_t<!IS_ROUNDED<T>> score_planes(const Head<T>& head, const float* query, int queries, const Tile& tile,
                                                     const void* const* ahead, float* planes) {
  float scores[(TILE + 8) * 4];
  score_queries<T>(queries, query, head.slots.dim, tile, ahead, scores);
  part_queries(scores, queries, planes);
  if (!head.key_scale) return;
  float scale[TILE];
  key_scales(head, tile, scale);
  for (int q = 0; q < queries; ++q)
    for (int t = 0; t < TILE; t += LANES) store(planes + q * TILE + t, load(planes + q * TILE + t) * load(scale + t));
}
