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

template <class T>
static int page_scores_kind(const PageScores& p) {
  const int64_t group = p.query_heads / p.kv_heads, step = 64, parts = (p.pages + step - 1) / step;
#pragma omp parallel for schedule(static) num_threads(int(p.threads)) if (p.threads > 1)
  for (int64_t task = 0; task < p.batch * p.kv_heads * parts; ++task) {
    const int64_t first = task % parts * step, h = task / parts % p.kv_heads, b = task / parts / p.kv_heads;
    const int64_t last = first + step < p.pages ? first + step : p.pages;
    float query[MAX_DIM], low[MAX_DIM + LANES], high[MAX_DIM + LANES];
    for (int64_t page = first; page < last; ++page) {
      const T* lowest = static_cast<const T*>(p.lowest) + b * p.low_batch + h * p.low_head + page * p.low_page;
      const T* highest = static_cast<const T*>(p.highest) + b * p.high_batch + h * p.high_head + page * p.high_page;
      widen_row(lowest, low, p.dim, 1.f);
      widen_row(highest, high, p.dim, 1.f);
      bool empty = false;
      for (int64_t d = 0; d < p.dim; ++d) empty |= low[d] > high[d];
      for (int64_t g = 0; g < group; ++g) {
        const int64_t query_head = h * group + g;
        read_row(p.query, p.query_kind, b * p.query_batch + query_head * p.query_head, query, p.dim, 1.f);
        Vec total = Vec{};
        int64_t d = 0;
        for (; d + LANES <= p.dim; d += LANES)
          total += larger(load(query + d) * load(low + d), load(query + d) * load(high + d));
        float sum = sum_lanes(total);
        for (; d < p.dim; ++d) sum += fmaxf(query[d] * low[d], query[d] * high[d]);
        p.scores[(b * p.query_heads + query_head) * p.pages + page] = empty ? -INFINITY : sum;
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
