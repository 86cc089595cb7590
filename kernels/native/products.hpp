// The largest dot product of each slot over the query heads of its KV head (TidalDecode), for one query row.

// The largest of the products of a tile's slots, [queries][TILE], with those found before; -inf for good where one is no number.
static inline void take_largest(const float* planes, int queries, float* most) {
  for (int t = 0; t < TILE; t += LANES) {
    Vec best = load(most + t);
    for (int q = 0; q < queries; ++q) {
      const Vec product = load(planes + q * TILE + t);
      best = product != product || best != best ? splat(NAN) : larger(product, best);
    }
    store(most + t, best);
  }
}

// The slots `begin … end - 1` of one head.
template <class T>
static void products_piece(const Head<T>& head, const float* query, int64_t group, int64_t begin, int64_t end, float* out) {
  fill(out + begin, end - begin, -INFINITY);
  Tile tiles[2];
  float planes[4 * TILE], most[TILE];
  int64_t entry = head.collect(tiles[0], begin, end, INT64_MAX);
  for (int turn = 0; tiles[turn].count; turn ^= 1) {
    const Tile& tile = tiles[turn];
    Tile& next = tiles[turn ^ 1];
    entry = head.collect(next, entry, end, INT64_MAX);
    fill(most, TILE, -INFINITY);
    for (int64_t q = 0; q < group; q += 4) {
      const int here = int(group - q < 4 ? group - q : 4);
      score_planes(head, query + q * head.slots.dim, here, tile, (next.count ? next : tile).key, planes);
      take_largest(planes, here, most);
    }
    for (int t = 0; t < tile.count; ++t) out[tile.entry[t]] = most[t] == most[t] ? most[t] : -INFINITY;
  }
}

template <class T>
static int products_kind(const Attention& a) {
  const Slots& s = a.slots;
  const int64_t group = a.query_heads / a.kv_heads, heads = a.batch * a.kv_heads;
  constexpr int64_t PIECE = 16 * TILE;
  const int64_t pieces = (s.slots + PIECE - 1) / PIECE;
  Buffer<float> queries(a.batch * a.query_heads * s.dim);
  if (!queries.data) return OUT_OF_MEMORY;
  for (int64_t i = 0; i < heads; ++i)
    load_queries(a, i / a.kv_heads, i % a.kv_heads, 0, 1, queries.data + i * group * s.dim);
  const bool large = heads * s.slots * s.dim * int64_t(sizeof(T)) > SMALL_WORK;
#pragma omp parallel for schedule(static) num_threads(int(a.threads)) if (a.threads > 1 && large)
  for (int64_t task = 0; task < heads * pieces; ++task) {
    const int64_t i = task / pieces, begin = task % pieces * PIECE;
    const int64_t end = begin + PIECE < s.slots ? begin + PIECE : s.slots;
    const Head<T> head(s, a.kv_heads, i / a.kv_heads, i % a.kv_heads);
    products_piece(head, queries.data + i * group * s.dim, group, begin, end, a.weights + i * s.slots);
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
