// Pages of slots: the lowest and highest key of each, channel by channel, and the bound they give on a query's scores.

static void put_bounds(void* base, int64_t kind, int64_t offset, const float* from, int64_t dim, bool below) {
  for (int64_t d = 0; d < dim; ++d) {
    if (kind == BF16) put_bound(static_cast<BFloat16*>(base) + offset + d, from[d], below);
    else if (kind == FP16) put_bound(static_cast<Float16*>(base) + offset + d, from[d], below);
    else put_bound(static_cast<float*>(base) + offset + d, from[d], below);
  }
}

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
    put_bounds(p.lowest, p.bound_kind, task * p.dim, low, p.dim, true);
    put_bounds(p.highest, p.bound_kind, task * p.dim, high, p.dim, false);
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

// bounds[page][q] = sum over channels of query * high, or * low where the query is negative, for SCORED pages and up to four queries
template <int QUERIES, class T>
static void bound_pages(const float* query, int64_t dim, const T* const* low, const T* const* high, float* bounds) {
  Vec sum[SCORED][QUERIES];
#pragma GCC unroll 4
  for (int r = 0; r < SCORED; ++r)
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q) sum[r][q] = Vec{};
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    Vec x[QUERIES];
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q) {
      x[q] = load(query + q * dim + d);
      KEEP_IN_REGISTER(x[q]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < SCORED; ++r) {
      const Vec least = load(low[r] + d), most = load(high[r] + d);
#pragma GCC unroll 4
      for (int q = 0; q < QUERIES; ++q) sum[r][q] += x[q] * by_sign(x[q], least, most);
    }
  }
  sum_slots<QUERIES>(sum, bounds);
  for (; d < dim; ++d)
    for (int r = 0; r < SCORED; ++r)
      for (int q = 0; q < QUERIES; ++q) {
        const float x = query[q * dim + d];
        bounds[r * 4 + q] += x * one((std::signbit(x) ? low[r] : high[r]) + d);
      }
}

// The scores of the pages `first … last - 1` of one KV head.
template <class T>
static void score_part(const PageScores& p, const float* queries, int64_t b, int64_t h, int64_t first, int64_t last) {
  const int64_t group = p.query_heads / p.kv_heads, head = b * p.query_heads + h * group;
  const T* lowest = static_cast<const T*>(p.lowest) + b * p.low_batch + h * p.low_head;
  const T* highest = static_cast<const T*>(p.highest) + b * p.high_batch + h * p.high_head;
  for (int64_t page = first; page < last; page += SCORED) {
    const int count = int(last - page < SCORED ? last - page : SCORED);
    const T *low[SCORED], *high[SCORED];
    bool empty[SCORED];
    for (int r = 0; r < SCORED; ++r) {
      const int64_t here = page + (r < count ? r : count - 1);
      low[r] = lowest + here * p.low_page;
      high[r] = highest + here * p.high_page;
      empty[r] = one(low[r]) > one(high[r]);
    }
    for (int64_t g = 0; g < group; g += 4) {
      const float* query = queries + (head + g) * p.dim;
      float bounds[SCORED * 4];
      switch (group - g) {
        case 1: bound_pages<1>(query, p.dim, low, high, bounds); break;
        case 2: bound_pages<2>(query, p.dim, low, high, bounds); break;
        case 3: bound_pages<3>(query, p.dim, low, high, bounds); break;
        default: bound_pages<4>(query, p.dim, low, high, bounds);
      }
      for (int64_t q = 0; q < 4 && g + q < group; ++q)
        for (int r = 0; r < count; ++r)
          p.scores[(head + g + q) * p.pages + page + r] = empty[r] ? -INFINITY : bounds[r * 4 + q];
    }
  }
}

// All scores, by the threads of the team that calls: in parts of some pages, so that three KV heads keep two threads equally busy.
static void score_pages(const PageScores& p, const float* queries) {
  const int64_t step = 64, parts = (p.pages + step - 1) / step;
#pragma omp for schedule(static)
  for (int64_t task = 0; task < p.batch * p.kv_heads * parts; ++task) {
    const int64_t first = task % parts * step, h = task / parts % p.kv_heads, b = task / parts / p.kv_heads;
    const int64_t last = first + step < p.pages ? first + step : p.pages;
    switch (p.kind) {
      case BF16: score_part<BFloat16>(p, queries, b, h, first, last); break;
      case FP16: score_part<Float16>(p, queries, b, h, first, last); break;
      default: score_part<float>(p, queries, b, h, first, last);
    }
  }
}

static void read_queries(const PageScores& p, float* queries) {
  for (int64_t i = 0; i < p.batch * p.query_heads; ++i) {
    const int64_t offset = i / p.query_heads * p.query_batch + i % p.query_heads * p.query_head;
    read_row(p.query, p.query_kind, offset, queries + i * p.dim, p.dim, 1.f);
  }
}

static int threads_for(const PageScores& p) {
  return p.batch * p.kv_heads * p.pages * p.dim * (p.kind == FP32 ? 4 : 2) > SMALL_WORK ? int(p.threads) : 1;
}

static int page_scores(const PageScores& p) {
  Buffer<float> queries(p.batch * p.query_heads * p.dim);
  if (!queries.data) return OUT_OF_MEMORY;
  read_queries(p, queries.data);
  const int threads = threads_for(p);
#pragma omp parallel num_threads(threads) if (threads > 1)
  score_pages(p, queries.data);
  return OK;
}
