// The largest dot product of each slot over the query heads of its KV head (TidalDecode), for one query row.

template <int QUERIES, class T>
static void multiply_queries(const float* query, int64_t dim, const T* key, float* products) {
  Vec sums[4] = {Vec{}, Vec{}, Vec{}, Vec{}};
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    const Vec x = load(key + d);
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q) sums[q] += x * load(query + q * dim + d);
  }
  sum_four(sums, products);
  for (; d < dim; ++d)
    for (int q = 0; q < QUERIES; ++q) products[q] += one(key + d) * query[q * dim + d];
}

// The largest of a key's products with all queries of its group; -inf where one of them is no number.
template <class T>
static float largest_product(const float* query, int64_t group, int64_t dim, const T* key, float scale) {
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
      const float product = products[q] * scale;
      known &= product == product;
      most = product > most ? product : most;
    }
  }
  return known ? most : -INFINITY;
}

template <class T>
static int products_kind(const Attention& a) {
  const Slots& s = a.slots;
  const int64_t group = a.query_heads / a.kv_heads, heads = a.batch * a.kv_heads;
  constexpr int64_t PIECE = 1024;
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
    for (int64_t slot = begin; slot < end; ++slot) {
      const bool held = !head.positions || head.positions[slot] >= 0;
      const float scale = head.key_scale ? head.key_scale[slot * s.key_scale_slot] : 1.f;
      const T* key = head.keys + slot * s.key_slot;
      a.weights[i * s.slots + slot] =
          held ? largest_product(queries.data + i * group * s.dim, group, s.dim, key, scale) : -INFINITY;
    }
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
