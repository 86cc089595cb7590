// Head vote: the softmax of every query head over the visible slots, summed over all heads (one query row).
//
// Keys are read once. What remains of a tile of TILE slots are exp(score - maximum of its piece so far), as
// [KV head][slot][quad][4], and that maximum; a second pass sums them, times a factor for each tile and query.

struct Votes {  // of one batch row
  int64_t tiles, pieces;       // of each KV head: TILE slots, and PIECE tiles
  float* weight;               // [KV head][slot][quad][4]
  float* base;                 // [KV head][tile][quad][4]: what was subtracted from the scores; then the tile's factor
  float* maximum;              // [KV head][piece][quad][4]
  float* sum;
};

constexpr int64_t PIECE = 32;  // tiles of a piece

// One piece of one KV head: `scores` of its tiles, softened tile by tile.
template <class T>
static void vote_piece(const Attention& a, const Head<T>& head, int64_t h, int64_t piece, int64_t limit,
                       const float* query, const Votes& votes) {
  const int64_t group = a.query_heads / a.kv_heads, line = a.weights_entries;
  const int quads = int((group + 3) / 4);
  float* maximum = votes.maximum + (h * votes.pieces + piece) * quads * 4;
  float* sum = votes.sum + (h * votes.pieces + piece) * quads * 4;
  for (int q = 0; q < quads * 4; ++q) {
    maximum[q] = -INFINITY;
    sum[q] = 0;
  }
  Tile tiles[2];
  float scores[(TILE + 8) * 4], nothing[4] = {0, 0, 0, 0};
  const int64_t first = piece * PIECE, last = first + PIECE < votes.tiles ? first + PIECE : votes.tiles;
  const auto collect = [&](int64_t k, Tile& tile) {
    const int64_t end = (k + 1) * TILE < head.entries ? (k + 1) * TILE : head.entries;
    tile.count = 0;
    if (k < last && k * TILE < end) head.collect(tile, k * TILE, end, limit);
  };
  collect(first, tiles[0]);
  for (int64_t k = first; k < last; ++k) {
    const Tile& tile = tiles[(k - first) % 2];
    Tile& next = tiles[(k - first + 1) % 2];
    collect(k + 1, next);
    const int64_t end = (k + 1) * TILE < line ? (k + 1) * TILE : line;
    float* weight = votes.weight + (h * line + k * TILE) * quads * 4;
    if (tile.count < end - k * TILE) fill(weight, (end - k * TILE) * quads * 4, 0.f);
    for (int quad = 0; quad < quads; ++quad) {
      float* top = maximum + quad * 4;
      if (tile.count) {
        const int here = int(group - quad * 4 < 4 ? group - quad * 4 : 4);
        score_queries<T>(here, query + quad * 4 * a.slots.dim, a.slots.dim, tile, (next.count ? next : tile).key, scores);
        if (a.slots.key_scale) scale_scores(scores, tile.count, [&](int t) { return head.key_scale_of(tile, t); });
        if (a.softcap != 0) cap_scores(scores, tile.count * 4, float(a.softcap));
        soften_quad(scores, tile.count, here, top, sum + quad * 4, nothing, 0);
        for (int t = 0; t < tile.count; ++t)
          std::memcpy(weight + ((tile.entry[t] - k * TILE) * quads + quad) * 4, scores + t * 4, 16);
      }
      std::memcpy(votes.base + ((h * votes.tiles + k) * quads + quad) * 4, top, 16);
    }
  }
}

// The votes of the slots of tile `k`: weights times factors, summed over all heads.
static void sum_tile(const Attention& a, const Votes& votes, int64_t k, float* out) {
  const int64_t line = a.weights_entries, end = (k + 1) * TILE < line ? (k + 1) * TILE : line;
  const int quads = int((a.query_heads / a.kv_heads + 3) / 4);
  float total[(TILE + LANES) * 4];
  fill(total, TILE * 4, 0.f);
  for (int64_t h = 0; h < a.kv_heads; ++h)
    for (int quad = 0; quad < quads; ++quad) {
      const float* factor = votes.base + ((h * votes.tiles + k) * quads + quad) * 4;
      const float* weight = votes.weight + ((h * line + k * TILE) * quads + quad) * 4;
      for (int64_t t = 0; t < end - k * TILE; ++t)
        for (int q = 0; q < 4; ++q) total[t * 4 + q] += weight[t * quads * 4 + q] * factor[q];
    }
  for (int64_t t = 0; t < end - k * TILE; ++t) {
    const float* of = total + t * 4;
    out[k * TILE + t] = (of[0] + of[1]) + (of[2] + of[3]);
  }
}

template <class T>
static int vote_kind(const Attention& a) {
  const Slots& s = a.slots;
  const int64_t group = a.query_heads / a.kv_heads, line = a.weights_entries, dim = s.dim;
  const int quads = int((group + 3) / 4);
  const int64_t tiles = (line + TILE - 1) / TILE, pieces = (tiles + PIECE - 1) / PIECE;
  const int64_t width = a.kv_heads * quads * 4;  // queries, padded
  Buffer<float> weight(width * line), base(width * tiles), maxima(width * pieces), sums(width * pieces), query(width * dim);
  if (!weight.data || !base.data || !maxima.data || !sums.data || !query.data) return OUT_OF_MEMORY;
  const Votes votes{tiles, pieces, weight.data, base.data, maxima.data, sums.data};
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t limit = a.query_positions ? a.query_positions[b * a.query_position_batch] : INT64_MAX;
    for (int64_t h = 0; h < a.kv_heads; ++h) load_queries(a, b, h, 0, 1, query.data + h * quads * 4 * dim);
#pragma omp parallel num_threads(int(a.threads)) if (a.threads > 1)
    {
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < a.kv_heads * pieces; ++task) {
        const int64_t h = task / pieces;
        const Head<T> head(s, a.kv_heads, b, h);
        vote_piece<T>(a, head, h, task % pieces, limit, query.data + h * quads * 4 * dim, votes);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < width; ++i) {
        const int64_t h = i / (quads * 4), q = i % (quads * 4);
        float maximum = -INFINITY, sum = 0;
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const float here = votes.maximum[(h * pieces + piece) * quads * 4 + q];
          if (here > maximum) maximum = here;
        }
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const int64_t at = (h * pieces + piece) * quads * 4 + q;
          if (votes.sum[at] != 0) sum += votes.sum[at] * expf(votes.maximum[at] - maximum);
        }
        for (int64_t k = 0; k < tiles; ++k) {
          float& at = votes.base[(h * tiles + k) * quads * 4 + q];
          at = q >= group || sum == 0 ? 0.f : expf(at - maximum) / sum;
        }
      }
#pragma omp for schedule(static)
      for (int64_t k = 0; k < tiles; ++k) sum_tile(a, votes, k, a.weights + b * line);
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
