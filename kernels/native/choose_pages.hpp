// Quest's step for one decoded token: its key widens the bounds of its page, pages are scored, the best become slots.

template <class T>
static void widen_page(T* low, T* high, const float* key, int64_t dim, bool begins) {
  for (int64_t d = 0; d < dim; ++d) {
    const float x = key[d];
    if (begins || x < one(low + d) || x != x) put_bound(low + d, x, true);
    if (begins || x > one(high + d) || x != x) put_bound(high + d, x, false);
  }
}

static void widen_last_page(const ChoosePages& c) {
  const PageScores& p = c.scores;
  float key[MAX_DIM];
  for (int64_t i = 0; i < p.batch * p.kv_heads; ++i) {
    const int64_t b = i / p.kv_heads, h = i % p.kv_heads, from = b * c.key_batch + h * c.key_head;
    if (c.key_kind == INT8)
      widen_row(static_cast<const int8_t*>(c.key) + from, key, p.dim, c.key_scale[b * c.scale_batch + h * c.scale_head]);
    else
      read_row(c.key, c.key_kind, from, key, p.dim, 1.f);
    const int64_t low = b * p.low_batch + h * p.low_head + c.page * p.low_page;
    const int64_t high = b * p.high_batch + h * p.high_head + c.page * p.high_page;
    switch (p.kind) {
      case BF16: widen_page(static_cast<BFloat16*>(c.low) + low, static_cast<BFloat16*>(c.high) + high, key, p.dim, c.begins); break;
      case FP16: widen_page(static_cast<Float16*>(c.low) + low, static_cast<Float16*>(c.high) + high, key, p.dim, c.begins); break;
      default: widen_page(static_cast<float*>(c.low) + low, static_cast<float*>(c.high) + high, key, p.dim, c.begins);
    }
  }
}

static int choose_pages(const ChoosePages& given) {
  ChoosePages c = given;
  if (c.key) widen_last_page(c);
  const int64_t heads = c.scores.batch * c.scores.kv_heads, queries = c.scores.batch * c.scores.query_heads;
  Buffer<float> query(queries * c.scores.dim), scores(queries * c.scores.pages);
  Buffer<char> scratch(heads * page_scratch(c.slots));
  if (!query.data || !scores.data || !scratch.data) return OUT_OF_MEMORY;
  c.scores.scores = scores.data;
  c.slots.scores = scores.data;
  read_queries(c.scores, query.data);
  const int threads = threads_for(c.scores);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    score_pages(c.scores, query.data);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < heads; ++i) page_slots_of(c.slots, i, scratch.data + i * page_scratch(c.slots));
  }
  return OK;
}
