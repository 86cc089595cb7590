// Pages of slots: the lowest and highest key of each, channel by channel, and the bound they give on a query's scores.

template <class T>
static int bounds_kind(const PageBounds& p) {
  const int64_t pages = (p.slots + p.page_size - 1) / p.page_size;
#pragma omp parallel for schedule(static) num_threads(int(p.threads)) if (p.threads > 1)
  for (int64_t task = 0; task < p.batch * p.kv_heads * pages; ++task) {
    const int64_t page = task % pages, h = task / pages % p.kv_heads, b = task / pages / p.kv_heads;
    const Positions positions(p.positions, p.position_bytes, b * p.position_batch + h * p.position_head);
    const T* keys = static_cast<const T*>(p.keys) + b * p.key_batch + h * p.key_head;
    float low[MAX_DIM], high[MAX_DIM], row[MAX_DIM];
    fill(low, p.dim, INFINITY);
    fill(high, p.dim, -INFINITY);
    const int64_t end = (page + 1) * p.page_size < p.slots ? (page + 1) * p.page_size : p.slots;
    for (int64_t slot = page * p.page_size; slot < end; ++slot) {
      if (positions && positions[slot] < 0) continue;
      widen_row(keys + slot * p.key_slot, row, p.dim, 1.f);
      for (int64_t d = 0; d < p.dim; ++d) {
        low[d] = row[d] < low[d] || row[d] != row[d] ? row[d] : low[d];
        high[d] = row[d] > high[d] || row[d] != row[d] ? row[d] : high[d];
      }
    }
    put_row(p.lowest, p.kind, task * p.dim, low, p.dim);
    put_row(p.highest, p.kind, task * p.dim, high, p.dim);
  }
  return OK;
}

static int page_bounds(const PageBounds& p) {
  switch (p.kind) {
    case BF16: return bounds_kind<BFloat16>(p);
    case FP16: return bounds_kind<Float16>(p);
    default: return bounds_kind<float>(p);
  }
}

// bounds[q] = sum over channels of the larger of query * low and query * high, for up to four queries; whether the page is empty
template <int QUERIES, class T>
static bool bound_queries(const float* query, int64_t dim, const T* low, const T* high, float* bounds) {
  Vec sums[4] = {Vec{}, Vec{}, Vec{}, Vec{}};
  VecInt crossed = VecInt{};
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    const Vec least = load(low + d), most = load(high + d);
    crossed |= least > most;
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q) {
      const Vec x = load(query + q * dim + d);
      sums[q] += larger(x * least, x * most);
    }
  }
  sum_four(sums, bounds);
  bool empty = false;
  for (int i = 0; i < LANES; ++i) empty |= crossed[i] != 0;
  for (; d < dim; ++d) {
    const float least = one(low + d), most = one(high + d);
    empty |= least > most;
    for (int q = 0; q < QUERIES; ++q) bounds[q] += fmaxf(query[q * dim + d] * least, query[q * dim + d] * most);
  }
  return empty;
}

template <class T>
static int page_scores_kind(const PageScores& p) {
  const int64_t group = p.query_heads / p.kv_heads, step = 64, parts = (p.pages + step - 1) / step;
  Buffer<float> queries(p.batch * p.query_heads * p.dim);
  if (!queries.data) return OUT_OF_MEMORY;
  for (int64_t i = 0; i < p.batch * p.query_heads; ++i) {
    const int64_t offset = i / p.query_heads * p.query_batch + i % p.query_heads * p.query_head;
    read_row(p.query, p.query_kind, offset, queries.data + i * p.dim, p.dim, 1.f);
  }
  const bool large = p.batch * p.kv_heads * p.pages * p.dim * int64_t(sizeof(T)) > SMALL_WORK;
#pragma omp parallel for schedule(static) num_threads(int(p.threads)) if (p.threads > 1 && large)
  for (int64_t task = 0; task < p.batch * p.kv_heads * parts; ++task) {
    const int64_t first = task % parts * step, h = task / parts % p.kv_heads, b = task / parts / p.kv_heads;
    const int64_t last = first + step < p.pages ? first + step : p.pages, head = b * p.query_heads + h * group;
    for (int64_t page = first; page < last; ++page) {
      const T* low = static_cast<const T*>(p.lowest) + b * p.low_batch + h * p.low_head + page * p.low_page;
      const T* high = static_cast<const T*>(p.highest) + b * p.high_batch + h * p.high_head + page * p.high_page;
      for (int64_t g = 0; g < group; g += 4) {
        const float* query = queries.data + (head + g) * p.dim;
        float bounds[4];
        bool empty;
        switch (group - g) {
          case 1: empty = bound_queries<1>(query, p.dim, low, high, bounds); break;
          case 2: empty = bound_queries<2>(query, p.dim, low, high, bounds); break;
          case 3: empty = bound_queries<3>(query, p.dim, low, high, bounds); break;
          default: empty = bound_queries<4>(query, p.dim, low, high, bounds);
        }
        for (int64_t q = 0; q < 4 && g + q < group; ++q)
          p.scores[(head + g + q) * p.pages + page] = empty ? -INFINITY : bounds[q];
      }
    }
  }
  return OK;
}

static int page_scores(const PageScores& p) {
  switch (p.kind) {
    case BF16: return page_scores_kind<BFloat16>(p);
    case FP16: return page_scores_kind<Float16>(p);
    default: return page_scores_kind<float>(p);
  }
}
