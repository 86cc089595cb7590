// Head vote: the softmax of every query head over the visible slots, summed over all heads (one query row).
//
// Keys are read once. What remains of a tile of TILE slots are exp(score - maximum of its piece so far), as
// [tile][query head][slot], and that maximum; a second pass sums them, times a factor for each tile and query head.

struct Votes {  // of one batch row; `width` query heads, padded to whole vectors
  int64_t width, tiles, pieces;  // TILE slots, and PIECE tiles
  float* weight;                 // [tile][query head][TILE]
  float* base;                   // [tile][width]: what was subtracted from the scores
  float* maximum;                // [piece][width]
  float* sum;
};

constexpr int64_t PIECE = 32;  // tiles of a piece

// One tile's step of the running softmax of one query: weights [TILE] become exp(score - maximum).
static inline void soften_plane(const float* scores, float* weight, float* maximum, float* sums) {
  Vec best = splat(*maximum);
  for (int i = 0; i < TILE; i += LANES) best = larger(load(scores + i), best);
  Vec sum = load(sums);
  if (any_above(best, splat(*maximum))) {  // seldom. Exponentials would wait for a maximum across lanes, so else none is taken
    const float top = max_lanes(best);
    sum = sum * splat(expf(*maximum - top));
    *maximum = top;
  }
  const Vec shift = splat(*maximum == -INFINITY ? 0.f : *maximum);
  EACH(i, TILE / LANES) {
    const Vec p = exp_vec(load(scores + i * LANES) - shift);
    sum += p;
    store(weight + i * LANES, p);
  }
  store(sums, sum);
}

// How many tiles from the first on hold the slots of their own numbers, none left out. Slots without positions are all seen or none.
template <class T>
static int64_t whole_tiles(const Head<T>& head, int64_t limit) {
  return head.index || head.positions || limit < 0 ? 0 : head.entries / TILE;
}

// One such tile of one KV head.
template <class T>
static void vote_run(const Attention& a, const Head<T>& head, int64_t h, int64_t k, const float* query, const Votes& votes,
                     float* maximum, float* sums) {
  const int64_t group = a.query_heads / a.kv_heads;
  float planes[4 * TILE];
  float* weight = votes.weight + (k * a.query_heads + h * group) * TILE;
  for (int64_t q = 0; q < group; q += 4) {
    const int here = int(group - q < 4 ? group - q : 4);
    score_run(head, query + q * a.slots.dim, here, k * TILE, planes);
    for (int i = 0; i < here; ++i) soften_plane(planes + i * TILE, weight + (q + i) * TILE, maximum + q + i, sums + (q + i) * LANES);
  }
  std::memcpy(votes.base + k * votes.width + h * group, maximum, sizeof(float) * size_t(group));
}

// One piece of one KV head, tile by tile. `sums` is scratch, LANES numbers a query.
template <class T>
static void vote_piece(const Attention& a, const Head<T>& head, int64_t h, int64_t piece, int64_t limit, const float* query,
                       const Votes& votes, float* sums) {
  const int64_t group = a.query_heads / a.kv_heads;
  float* maximum = votes.maximum + piece * votes.width + h * group;
  fill(maximum, group, -INFINITY);
  fill(sums, group * LANES, 0.f);
  float planes[4 * TILE];
  int64_t first = piece * PIECE;
  const int64_t last = first + PIECE < votes.tiles ? first + PIECE : votes.tiles;
  if constexpr (IS_ROUNDED<T>)
    for (const int64_t whole = whole_tiles(head, limit); first < last && first < whole; ++first)
      vote_run(a, head, h, first, query, votes, maximum, sums);
  Tile tiles[2];
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
    float* weight = votes.weight + (k * a.query_heads + h * group) * TILE;
    const bool whole = tile.count && tile.entry[tile.count - 1] == k * TILE + tile.count - 1;  // no slot is left out
    if (!whole) fill(weight, group * TILE, 0.f);
    for (int64_t q = 0; q < group && tile.count; q += 4) {
      const int here = int(group - q < 4 ? group - q : 4);
      score_planes(head, query + q * a.slots.dim, here, tile, (next.count ? next : tile).key, planes);
      for (int i = 0; i < here; ++i) {
        float *scores = planes + i * TILE, *to = weight + (q + i) * TILE;
        fill(scores + tile.count, TILE - tile.count, -INFINITY);
        soften_plane(scores, whole ? to : scores, maximum + q + i, sums + (q + i) * LANES);
        if (!whole)
          for (int t = 0; t < tile.count; ++t) to[tile.entry[t] - k * TILE] = scores[t];
      }
    }
    std::memcpy(votes.base + k * votes.width + h * group, maximum, sizeof(float) * size_t(group));
  }
  for (int64_t q = 0; q < group; ++q) votes.sum[piece * votes.width + h * group + q] = sum_lanes(load(sums + q * LANES));
}

// Of `LANES` query heads from `first` on: the maximum of all pieces, and the inverse of the sum. They take the place of the first piece's.
static void join_pieces(const Votes& votes, int64_t first) {
  Vec maximum = splat(-INFINITY), sum = Vec{};
  for (int64_t piece = 0; piece < votes.pieces; ++piece) maximum = larger(load(votes.maximum + piece * votes.width + first), maximum);
  const Vec shift = maximum == splat(-INFINITY) ? Vec{} : maximum;
  for (int64_t piece = 0; piece < votes.pieces; ++piece) {
    const int64_t at = piece * votes.width + first;
    sum += load(votes.sum + at) * exp_vec(load(votes.maximum + at) - shift);
  }
  store(votes.maximum + first, shift);
  store(votes.sum + first, sum == Vec{} ? Vec{} : splat(1.f) / sum);
}

// The votes of the slots of tile `k`: weights times factors, summed over all heads.
static void sum_tile(const Attention& a, const Votes& votes, int64_t k, float* out) {
  float* factor = votes.base + k * votes.width;
  for (int64_t i = 0; i < votes.width; i += LANES)
    store(factor + i, exp_vec(load(factor + i) - load(votes.maximum + i)) * load(votes.sum + i));
  Vec total[TILE / LANES];
  for (Vec& each : total) each = Vec{};
  const float* weight = votes.weight + k * a.query_heads * TILE;
  for (int64_t i = 0; i < a.query_heads; ++i, weight += TILE)
    for (int t = 0; t < TILE / LANES; ++t) total[t] += load(weight + t * LANES) * splat(factor[i]);
  const int64_t line = a.weights_entries, count = (k + 1) * TILE < line ? TILE : line - k * TILE;
  std::memcpy(out + k * TILE, total, sizeof(float) * size_t(count));
}

template <class T>
static int vote_kind(const Attention& a) {
  const Slots& s = a.slots;
  const int64_t group = a.query_heads / a.kv_heads, line = a.weights_entries;
  const int64_t tiles = (line + TILE - 1) / TILE, pieces = (tiles + PIECE - 1) / PIECE;
  const int64_t width = (a.query_heads + LANES - 1) / LANES * LANES;
  Buffer<float> weight(a.query_heads * tiles * TILE), base(width * tiles), maxima(width * pieces), sums(width * pieces);
  Buffer<float> query(a.query_heads * s.dim), scratch(a.threads * group * LANES);
  if (!weight.data || !base.data || !maxima.data || !sums.data || !query.data || !scratch.data) return OUT_OF_MEMORY;
  const Votes votes{width, tiles, pieces, weight.data, base.data, maxima.data, sums.data};
  fill(base.data, width * tiles, 0.f);  // of heads that only fill up a vector
  fill(maxima.data, width * pieces, 0.f);
  fill(sums.data, width * pieces, 0.f);
  for (int64_t b = 0; b < a.batch && line; ++b) {
    const int64_t limit = a.query_positions ? a.query_positions[b * a.query_position_batch] : INT64_MAX;
    for (int64_t h = 0; h < a.kv_heads; ++h) load_queries(a, b, h, 0, 1, query.data + h * group * s.dim);
    if constexpr (IS_ROUNDED<T>)
      for (int64_t i = 0; i < a.query_heads; ++i) round_query(T(), query.data + i * s.dim, s.dim);
#pragma omp parallel num_threads(int(a.threads)) if (a.threads > 1)
    {
#pragma omp for schedule(static)  // what a thread reads lies side by side: one stream, not a new one for every piece
      for (int64_t task = 0; task < a.kv_heads * pieces; ++task) {
        const int64_t h = task / pieces;
        const Head<T> head(s, a.kv_heads, b, h);
        float* own = scratch.data + thread_number() * group * LANES;
        vote_piece<T>(a, head, h, task % pieces, limit, query.data + h * group * s.dim, votes, own);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < width; i += LANES) join_pieces(votes, i);
#pragma omp for schedule(static)
      for (int64_t k = 0; k < tiles; ++k) sum_tile(a, votes, k, a.weights + b * line);
    }
  }
  return OK;
}

template <bool VNNI>
static int vote_int8(const Attention& a) {
#if LANES >= 8
  if constexpr (VNNI)
    if (a.slots.dim % 4 == 0 && a.slots.dim >= LEAST_INT8) return vote_kind<Int8<VNNI>>(a);
#endif
  return vote_kind<int8_t>(a);
}

template <bool VNNI>
static int head_vote(const Vote& given) {
  const Prepared prepared(given.attention);
  if (prepared.status) return prepared.status;
  const Attention& a = prepared.a;
  switch (a.slots.kind) {
    case BF16: return vote_kind<BFloat16>(a);
    case FP16: return vote_kind<Float16>(a);
    case INT8: return vote_int8<VNNI>(a);
    case INT4: return vote_kind<Int4<VNNI>>(a);
    default: return vote_kind<float>(a);
  }
}
