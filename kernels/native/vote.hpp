// Head vote: the softmax of every query head over the visible slots, summed over all heads (one query row).
//
// Keys are read once for scores, which stay as [KV head][slot][quad][4]; a second pass over the scores sums the votes.

template <class T>
static int vote_kind(const Attention& a) {
  const Slots& s = a.slots;
  const int64_t group = a.query_heads / a.kv_heads, line = a.weights_entries, dim = s.dim;
  const int quads = int((group + 3) / 4);
  constexpr int64_t PIECE = 32 * TILE;
  const int64_t pieces = (line + PIECE - 1) / PIECE;
  Buffer<float> raw(a.kv_heads * line * quads * 4 + LANES), maxima(a.kv_heads * pieces * quads * 4),
      sums(a.kv_heads * pieces * quads * 4), lse(a.kv_heads * quads * 4), queries(a.kv_heads * quads * 4 * dim);
  if (!raw.data || !maxima.data || !sums.data || !lse.data || !queries.data) return OUT_OF_MEMORY;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t limit = a.query_positions ? a.query_positions[b * a.query_position_batch] : INT64_MAX;
    for (int64_t h = 0; h < a.kv_heads; ++h) load_queries(a, b, h, 0, 1, queries.data + h * quads * 4 * dim);
#pragma omp parallel num_threads(int(a.threads)) if (a.threads > 1)
    {
      Tile tile;
      float scores[(TILE + 8) * 4], nothing[4] = {0, 0, 0, 0};
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < a.kv_heads * pieces; ++task) {
        const int64_t h = task / pieces, begin = task % pieces * PIECE;
        const Head<T> head(s, a.kv_heads, b, h);
        const int64_t stop = begin + PIECE < line ? begin + PIECE : line;
        const int64_t end = stop < head.entries ? stop : head.entries;
        float* keep = raw.data + h * line * quads * 4;
        fill(keep + begin * quads * 4, (stop - begin) * quads * 4, -INFINITY);
        float* maximum = maxima.data + task * quads * 4;
        float* sum = sums.data + task * quads * 4;
        for (int q = 0; q < quads * 4; ++q) {
          maximum[q] = -INFINITY;
          sum[q] = 0;
        }
        for (int64_t entry = begin; entry < end;) {
          entry = head.collect(tile, entry, end, limit);
          if (!tile.count) break;
          for (int quad = 0; quad < quads; ++quad) {
            const int here = int(group - quad * 4 < 4 ? group - quad * 4 : 4);
            score_queries<T>(here, queries.data + (h * quads + quad) * 4 * dim, dim, tile, scores);
            if (s.key_scale)
              for (int t = 0; t < tile.count; ++t)
                for (int q = 0; q < 4; ++q) scores[t * 4 + q] *= tile.key_scale[t];
            if (a.softcap != 0) cap_scores(scores, tile.count * 4, float(a.softcap));
            for (int t = 0; t < tile.count; ++t)
              std::memcpy(keep + (tile.entry[t] * quads + quad) * 4, scores + t * 4, 16);
            soften_quad(scores, tile.count, here, maximum + quad * 4, sum + quad * 4, nothing, 0);
          }
        }
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < a.kv_heads * quads * 4; ++i) {
        const int64_t h = i / (quads * 4), q = i % (quads * 4);
        float maximum = -INFINITY, sum = 0;
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const float here = maxima.data[(h * pieces + piece) * quads * 4 + q];
          if (here > maximum) maximum = here;
        }
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const int64_t at = (h * pieces + piece) * quads * 4 + q;
          if (sums.data[at] != 0) sum += sums.data[at] * expf(maxima.data[at] - maximum);
        }
        lse.data[i] = q >= group || sum == 0 ? INFINITY : maximum + logf(sum);
      }
#pragma omp for schedule(static)
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t end = (piece + 1) * PIECE < line ? (piece + 1) * PIECE : line;
        float shift[LANES], lane[LANES];
        constexpr int SLOTS = LANES / 4;
        for (int64_t first = piece * PIECE; first < end; first += SLOTS) {
          Vec total = Vec{};
          for (int64_t h = 0; h < a.kv_heads; ++h)
            for (int quad = 0; quad < quads; ++quad) {
              for (int i = 0; i < LANES; ++i) shift[i] = lse.data[(h * quads + quad) * 4 + i % 4];
              float* at = raw.data + ((h * line + first) * quads + quad) * 4;
              if (quads == 1) {
                total += exp_vec(load(at) - load(shift));
              } else {
                for (int i = 0; i < LANES; ++i)
                  lane[i] = first + i / 4 < end ? at[i / 4 * quads * 4 + i % 4] : -INFINITY;
                total += exp_vec(load(lane) - load(shift));
              }
            }
          store(lane, total);
          for (int i = 0; i < SLOTS && first + i < end; ++i)
            a.weights[b * line + first + i] = (lane[i * 4] + lane[i * 4 + 1]) + (lane[i * 4 + 2] + lane[i * 4 + 3]);
        }
      }
    }
  }
  return OK;
}

static int head_vote(const Vote& given) {
  const Prepared prepared(given.attention);
  if (prepared.status) return prepared.status;
  const Attention& a = prepared.a;
  switch (a.slots.kind) {
    case BF16: return vote_kind<BFloat16>(a);
    case FP16: return vote_kind<Float16>(a);
    case INT8: return vote_kind<int8_t>(a);
    default: return vote_kind<float>(a);
  }
}
