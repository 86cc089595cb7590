// Quest's step for one decoded token: its key widens the bounds of its page, pages are scored, the best become slots.

template <class T>
static void widen_page(const ChoosePages& c, int64_t low_offset, int64_t high_offset, const T* key) {
  T* low = static_cast<T*>(c.low) + low_offset;
  T* high = static_cast<T*>(c.high) + high_offset;
  for (int64_t d = 0; d < c.scores.dim; ++d) {
    const float x = one(key + d);
    if (c.begins || x < one(low + d) || x != x) low[d] = key[d];
    if (c.begins || x > one(high + d) || x != x) high[d] = key[d];
  }
}

template <class T>
static void widen_kind(const ChoosePages& c) {
  const PageScores& p = c.scores;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.kv_heads; ++h)
      widen_page(c, b * p.low_batch + h * p.low_head + c.page * p.low_page,
                 b * p.high_batch + h * p.high_head + c.page * p.high_page,
                 static_cast<const T*>(c.key) + b * c.key_batch + h * c.key_head);
}

static int choose_pages(const ChoosePages& given) {
  ChoosePages c = given;
  if (c.key) switch (c.scores.kind) {
      case BF16: widen_kind<BFloat16>(c); break;
      case FP16: widen_kind<Float16>(c); break;
      default: widen_kind<float>(c);
    }
  Buffer<float> scores(c.scores.batch * c.scores.query_heads * c.scores.pages);
  if (!scores.data) return OUT_OF_MEMORY;
  c.scores.scores = scores.data;
  c.slots.scores = scores.data;
  const int status = page_scores(c.scores);
  return status ? status : page_slots(c.slots);
}
