// TokenSelect's step for one decoded token over slots in order: what a former query chose serves once more while the new one is
// close to it; else the heads vote.

// The query of one batch row as it votes: [query_heads][dim] of its own kind, turned, the heads of a KV head side by side.
static int voting_query(const VotedSlots& v, const char* query, int64_t item, char* to) {
  const Attention& a = v.attention;
  const int64_t dim = a.slots.dim, group = a.query_heads / a.kv_heads;
  for (int64_t h = 0; h < a.query_heads; ++h, to += dim * item) {
    const int64_t source = v.regroup ? h % group * a.kv_heads + h / group : h;
    const char* from = query + source * a.query_head * item;
    if (!a.cosine) {
      std::memcpy(to, from, size_t(dim * item));
      continue;
    }
    Rotation turn{};
    turn.threads = turn.batch = turn.heads = turn.slots = 1;
    turn.dim = dim;
    turn.rotary = a.rotary;
    turn.source = from;
    turn.kind = a.query_kind;
    turn.cosine = a.cosine;
    turn.sine = a.sine;
    turn.sign = 1;
    turn.output = to;
    if (const int status = rotate(turn)) return status;
  }
  return OK;
}

#if LANES == 16
static int64_t collect_best(const float* scores, int64_t size, float least, uint32_t* slots) {
  const __m512 limit = _mm512_set1_ps(least);
  __m512i slot = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  int64_t found = 0, i = 0;
  for (; i + LANES <= size; i += LANES, slot = _mm512_add_epi32(slot, _mm512_set1_epi32(LANES))) {
    const __mmask16 reached = _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + i), limit, _CMP_GE_OQ);
    _mm512_storeu_si512(slots + found, _mm512_maskz_compress_epi32(reached, slot));  // room: no more were found than looked at
    found += __builtin_popcount(reached);
  }
  for (; i < size; ++i) {
    slots[found] = uint32_t(i);
    found += scores[i] >= least;
  }
  return found;
}
#else
constexpr Collect collect_best = collect_any;
#endif

// The `top_k` slots with most votes between sinks and window, of batch row `b`.
template <int (*HEAD_VOTE)(const Vote&)>
static int vote_anew(const VotedSlots& v, int64_t b, char* query, float* votes) {
  const int64_t size = v.attention.slots.slots - v.sinks - v.local;
  const int64_t bytes = v.attention.slots.kind == FP32 ? 4 : (v.attention.slots.kind >= INT8 ? 1 : 2);
  Vote vote{v.attention};
  Attention& a = vote.attention;
  Slots& s = a.slots;
  a.batch = 1;
  a.query = query;
  a.query_head = s.dim;
  a.cosine = a.sine = nullptr;
  a.weights = votes;
  a.weights_entries = s.slots = size;
  s.keys = static_cast<const char*>(s.keys) + (b * s.key_batch + v.sinks * s.key_slot) * bytes;
  if (s.key_scale) s.key_scale += b * s.key_scale_batch + v.sinks * s.key_scale_slot;
  if (const int status = HEAD_VOTE(vote)) return status;
  for (int64_t i = 0; i < size; ++i) votes[i] = votes[i] == votes[i] ? votes[i] : 0.f;
  int64_t* chosen = v.chosen + b * v.top_k;
  if (const int status = best_slots_by(collect_best, {1, 1, size, v.top_k, votes, size, chosen})) return status;
  for (int64_t i = 0; i < v.top_k; ++i) chosen[i] += v.sinks;
  return OK;
}

// `anew`: whether some batch row voted.
template <int (*HEAD_VOTE)(const Vote&)>
static int voted_slots(const VotedSlots& v, bool* anew) {
  const Attention& a = v.attention;
  const int64_t dim = a.slots.dim, item = a.query_kind == FP32 ? 4 : 2, size = a.slots.slots - v.sinks - v.local;
  if (size < v.top_k) return INDEX_OUT_OF_RANGE;
  *anew = false;
  for (int64_t b = 0; b < a.batch; ++b) {
    const char* query = static_cast<const char*>(a.query) + b * a.query_batch * item;
    char* former = static_cast<char*>(v.former) + b * a.query_heads * dim * item;
    if (v.live[b] && cosine_of(query, a.query_head, former, a.query_kind, a.query_heads, dim) >= v.threshold) continue;
    *anew = true;
    Buffer<char> voting(a.query_heads * dim * item);
    Buffer<float> votes(size);
    if (!voting.data || !votes.data) return OUT_OF_MEMORY;
    if (const int status = voting_query(v, query, item, voting.data)) return status;
    if (const int status = vote_anew<HEAD_VOTE>(v, b, voting.data, votes.data)) return status;
    for (int64_t h = 0; h < a.query_heads; ++h)
      std::memcpy(former + h * dim * item, query + h * a.query_head * item, size_t(dim * item));
    v.live[b] = 1;
  }
  return listed_slots({a.batch, v.sinks, v.top_k, v.local, a.slots.slots, v.chosen, v.index});
}
