// The largest dot product of each slot over the query heads of its KV head (TidalDecode), for one query row.

template <class T>
static int products_kind(const Attention& a) {
  const Slots& s = a.slots;
  const int64_t group = a.query_heads / a.kv_heads, line = a.weights_entries;
  constexpr int64_t PIECE = 16 * TILE;
  const int64_t pieces = (line + PIECE - 1) / PIECE;
  Buffer<float> queries(a.batch * a.query_heads * s.dim);
  if (!queries.data) return OUT_OF_MEMORY;
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t h = 0; h < a.kv_heads; ++h)
      load_queries(a, b, h, 0, 1, queries.data + (b * a.kv_heads + h) * group * s.dim);
#pragma omp parallel for schedule(static) num_threads(int(a.threads)) if (a.threads > 1 && a.batch * a.kv_heads * line * s.dim > SMALL_WORK)
  for (int64_t task = 0; task < a.batch * a.kv_heads * pieces; ++task) {
    const int64_t i = task / pieces, begin = task % pieces * PIECE;
    const Head<T> head(s, a.kv_heads, i / a.kv_heads, i % a.kv_heads);
    const int64_t stop = begin + PIECE < line ? begin + PIECE : line, end = stop < head.entries ? stop : head.entries;
    float* to = a.weights + i * line;
    fill(to + begin, stop - begin, -INFINITY);
    Tile tile;
    float scores[(TILE + 8) * 4];
    for (int64_t entry = begin; entry < end;) {
      entry = head.collect(tile, entry, end, INT64_MAX);
      if (!tile.count) break;
      for (int64_t first = 0; first < group; first += 4) {
        const int here = int(group - first < 4 ? group - first : 4);
        score_queries<T>(here, queries.data + (i * group + first) * s.dim, s.dim, tile, scores);
        for (int t = 0; t < tile.count; ++t)
          for (int q = 0; q < here; ++q) {
            const float product = scores[t * 4 + q] * (s.key_scale ? tile.key_scale[t] : 1.f);
            float& most = to[tile.entry[t]];
            if (most == most && !(product <= most)) most = product;  // a NaN stays
          }
      }
    }
    for (int64_t e = begin; e < stop; ++e)
      if (to[e] != to[e]) to[e] = -INFINITY;  // what is no number is never chosen
  }
  return OK;
}

static int group_products(const Vote& given) {
  const Prepared prepared(given.attention);
  if (prepared.status) return prepared.status;
  const Attention& a = prepared.a;
  switch (a.slots.kind) {
    case BF16: return products_kind<BFloat16>(a);
    case FP16: return products_kind<Float16>(a);
    case INT8: return products_kind<int8_t>(a);
    default: return products_kind<float>(a);
  }
}
