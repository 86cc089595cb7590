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

template <int QUERIES>
static void multiply_queries(const float* query, int64_t dim, const float* key, float* products) {
  Vec sums[4] = {Vec{}, Vec{}, Vec{}, Vec{}};
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    const Vec x = load(key + d);
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q) sums[q] += x * load(query + q * dim + d);
  }
  sum_four(sums, products);
  for (; d < dim; ++d)
    for (int q = 0; q < QUERIES; ++q) products[q] += key[d] * query[q * dim + d];
}

// The largest of a key's products with all queries of its group; -inf where one of them is no number.
static float largest_product(const float* query, int64_t group, int64_t dim, const float* key) {
  float most = -INFINITY;
  bool known = true;
  for (int64_t g = 0; g < group; g += 4, query += 4 * dim) {
    float products[4];
    switch (group - g) {
      case 1: multiply_queries<1>(query, dim, key, products); break;
      case 2: multiply_queries<2>(query, dim, key, products); break;
      case 3: multiply_queries<3>(query, dim, key, products); break;
      default: multiply_queries<4>(query, dim, key, products);
    }
    for (int64_t q = 0; q < 4 && g + q < group; ++q) {
      known &= products[q] == products[q];
      most = products[q] > most ? products[q] : most;
    }
  }
  return known ? most : -INFINITY;
}

// fp32 rows are bound by memory, not by sums: row by row, without tiles between, they are read faster.
static void products_piece(const Head<float>& head, const float* query, int64_t group, int64_t begin, int64_t end, float* out) {
  const Slots& s = head.slots;
  for (int64_t slot = begin; slot < end; ++slot) {
    const bool held = !head.positions || head.positions[slot] >= 0;
    out[slot] = held ? largest_product(query, group, s.dim, head.keys + slot * s.key_slot) : -INFINITY;
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
