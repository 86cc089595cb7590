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

// The `top_k` slots with most votes between sinks and window, of batch row `b`.
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
  if (const int status = head_vote(vote)) return status;
  for (int64_t i = 0; i < size; ++i) votes[i] = votes[i] == votes[i] ? votes[i] : 0.f;
  int64_t* chosen = v.chosen + b * v.top_k;
  if (const int status = best_slots({1, 1, size, v.top_k, votes, size, chosen})) return status;
  for (int64_t i = 0; i < v.top_k; ++i) chosen[i] += v.sinks;
  return OK;
}

// `anew`: whether some batch row voted.
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
    if (const int status = vote_anew(v, b, voting.data, votes.data)) return status;
    for (int64_t h = 0; h < a.query_heads; ++h)
      std::memcpy(former + h * dim * item, query + h * a.query_head * item, size_t(dim * item));
    v.live[b] = 1;
  }
  return listed_slots({a.batch, v.sinks, v.top_k, v.local, a.slots.slots, v.chosen, v.index});
}
