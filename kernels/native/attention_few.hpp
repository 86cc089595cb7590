// Attention of few queries a KV head (decoding): bound by reading K and V, so each is read once for all of them.
//
// Queries are taken in quads. Scores of a tile lie as [quad][slot][4], so that maxima, exponentials and sums go lane by
// lane with no reduction across a vector. All entries of all heads form one line that is cut into equal pieces, one
// piece a task: three KV heads keep two threads equally busy. A piece leaves, for every head it touches, a partial
// (maximum, sum, accumulator); partials are merged in the order of the line, whatever thread made them.

constexpr int FEW = 16;       // queries a KV head that this path takes
constexpr int QUADS = FEW / 4;

struct Few {  // scratch of one thread, and the state of the head it is at
  float query[FEW * MAX_DIM];           // [query][dim], scaled, zeros beyond the last query
  float scores[QUADS * (TILE + 8) * 4];
  float accumulator[FEW * MAX_DIM];     // [query][value_dim]
  float maximum[FEW], sum[FEW];
  float turned[TILE * MAX_DIM];         // keys of a tile, where they are turned as they are read
};

// scores[slot][0..3] = query rows 0..3 . key; meanwhile the rows `ahead` of the same slots' numbers are fetched
template <int QUERIES, class T>
static void score_quad(const float* query, int64_t dim, const Tile& tile, const void* const* ahead, float* scores) {
  // Rows of a few cache lines are read side by side, to load each piece of the queries once for all. Rows of many lines
  // are read one after the other: side by side, the hardware would not see that they are one stream.
  constexpr int STEP = sizeof(T) == 4 ? 1 : (sizeof(T) == 2 ? 2 : SCORED);
  const int64_t whole = dim - dim % LANES;
  for (int t = 0; t < tile.count; t += SCORED) {
    Vec sum[SCORED][QUERIES];
#pragma GCC unroll 4
    for (int r = 0; r < SCORED; ++r)
#pragma GCC unroll 4
      for (int q = 0; q < QUERIES; ++q) sum[r][q] = Vec{};
#pragma GCC unroll 4
    for (int first = 0; first < SCORED; first += STEP) {
      const T* key[STEP];
      const char* fetched[STEP];
#pragma GCC unroll 4
      for (int r = 0; r < STEP; ++r) {
        key[r] = static_cast<const T*>(tile.key[t + first + r]);
        fetched[r] = static_cast<const char*>(ahead[t + first + r]);
      }
      for (int64_t d = 0; d < whole; d += LANES) {
        Vec x[STEP];
#pragma GCC unroll 4
        for (int r = 0; r < STEP; ++r) x[r] = load(key[r] + d);
#pragma GCC unroll 4
        for (int q = 0; q < QUERIES; ++q) {
          Vec y = load(query + q * dim + d);
          if (STEP > 1) KEEP_IN_REGISTER(y);
#pragma GCC unroll 4
          for (int r = 0; r < STEP; ++r) sum[first + r][q] += x[r] * y;
        }
        if (d * int64_t(sizeof(T)) % 64 == 0) {
#pragma GCC unroll 4
          for (int r = 0; r < STEP; ++r) __builtin_prefetch(fetched[r] + d * sizeof(T));
        }
      }
    }
    float* out = scores + t * 4;
    sum_slots<QUERIES>(sum, out);
    for (int64_t d = whole; d < dim; ++d)
      for (int r = 0; r < SCORED; ++r)
        for (int q = 0; q < QUERIES; ++q)
          out[r * 4 + q] += one(static_cast<const T*>(tile.key[t + r]) + d) * query[q * dim + d];
  }
}

struct Fetch {  // asks for the cache lines of a tile's keys one by one, in the order of memory: that is the fast order
  const Tile& tile;
  int64_t row_bytes, byte = 0;
  int row = 0;
  void step() {
    __builtin_prefetch(static_cast<const char*>(tile.key[row]) + byte);  // to L1: what is asked for L2 alone comes late
    byte += 64;
    if (byte >= row_bytes) {
      byte = 0;
      row += row < TILE;
    }
  }
};

// WIDE vectors of `add_values`, from dimension `d` on
template <int QUERIES, int WIDE, class T>
static inline void add_block(const float* p, const Tile& tile, Fetch& fetch, int64_t dim, int64_t d, float* accumulator) {
  constexpr int BYTES = WIDE * LANES * int(sizeof(T)), PACE = BYTES < 64 ? 64 / BYTES : 1, LINES = BYTES > 64 ? BYTES / 64 : 1;
  Vec sum[QUERIES][WIDE];
#pragma GCC unroll 4
  for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 2
    for (int w = 0; w < WIDE; ++w) sum[q][w] = load(accumulator + q * dim + d + w * LANES);
  for (int t = 0; t < tile.count; ++t) {
    const T* v = static_cast<const T*>(tile.value[t]) + d;
    if (t % PACE == 0)
#pragma GCC unroll 2
      for (int line = 0; line < LINES; ++line) fetch.step();
    Vec x[WIDE];
#pragma GCC unroll 2
    for (int w = 0; w < WIDE; ++w) x[w] = load(v + w * LANES);
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q) {
      const Vec weight = splat(p[t * 4 + q]);
#pragma GCC unroll 2
      for (int w = 0; w < WIDE; ++w) sum[q][w] += weight * x[w];
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 2
    for (int w = 0; w < WIDE; ++w) store(accumulator + q * dim + d + w * LANES, sum[q][w]);
}

// accumulator[q][:] += sum over slots of p[slot][q] * value; meanwhile the keys of `next` are fetched
template <int QUERIES, class T>
static void add_values(const float* p, const Tile& tile, const Tile& next, int64_t dim, float* accumulator) {
  constexpr int WIDE = 2;
  Fetch fetch{next, dim * int64_t(sizeof(T))};
  int64_t d = 0;
  for (; d + WIDE * LANES <= dim; d += WIDE * LANES) add_block<QUERIES, WIDE, T>(p, tile, fetch, dim, d, accumulator);
  for (; d + LANES <= dim; d += LANES) add_block<QUERIES, 1, T>(p, tile, fetch, dim, d, accumulator);
  for (; d < dim; ++d)
    for (int q = 0; q < QUERIES; ++q)
      for (int t = 0; t < tile.count; ++t)
        accumulator[q * dim + d] += p[t * 4 + q] * one(static_cast<const T*>(tile.value[t]) + d);
}

template <class T>
static void score_queries(int queries, const float* query, int64_t dim, const Tile& tile, const void* const* ahead,
                          float* scores) {
  switch (queries) {
    case 1: return score_quad<1, T>(query, dim, tile, ahead, scores);
    case 2: return score_quad<2, T>(query, dim, tile, ahead, scores);
    case 3: return score_quad<3, T>(query, dim, tile, ahead, scores);
    default: return score_quad<4, T>(query, dim, tile, ahead, scores);
  }
}
template <class T>
static void add_queries(int queries, const float* p, const Tile& tile, const Tile& next, int64_t dim,
                        float* accumulator) {
  switch (queries) {
    case 1: return add_values<1, T>(p, tile, next, dim, accumulator);
    case 2: return add_values<2, T>(p, tile, next, dim, accumulator);
    case 3: return add_values<3, T>(p, tile, next, dim, accumulator);
    default: return add_values<4, T>(p, tile, next, dim, accumulator);
  }
}

// One tile's step of the running softmax for the four queries of a quad: scores become exp(score - maximum).
static void soften_quad(float* scores, int count, int queries, float* maximum, float* sum, float* accumulator,
                        int64_t dim) {
  const int floats = count * 4;
  const int padded = (floats + LANES - 1) / LANES * LANES;
  for (int i = floats; i < padded; ++i) scores[i] = -INFINITY;
  Vec best = splat(-INFINITY);
  for (int i = 0; i < padded; i += LANES) best = larger(load(scores + i), best);
  float top[4], lane[LANES];
  store(lane, best);
  for (int q = 0; q < 4; ++q) {
    top[q] = maximum[q];
    for (int i = q; i < LANES; i += 4) top[q] = lane[i] > top[q] ? lane[i] : top[q];
  }
  float base[4];
  for (int q = 0; q < 4; ++q) base[q] = top[q] == -INFINITY ? 0.f : top[q];
  for (int i = 0; i < LANES; ++i) lane[i] = base[i % 4];
  const Vec shift = load(lane);
  Vec total = Vec{};
  for (int i = 0; i < padded; i += LANES) {
    const Vec p = exp_vec(load(scores + i) - shift);
    total += p;
    store(scores + i, p);
  }
  store(lane, total);
  for (int q = 0; q < queries; ++q) {
    float added = 0;
    for (int i = q; i < LANES; i += 4) added += lane[i];
    if (top[q] > maximum[q] && maximum[q] != -INFINITY) {
      const float shrink = expf(maximum[q] - top[q]);
      sum[q] *= shrink;
      for (int64_t d = 0; d < dim; ++d) accumulator[q * dim + d] *= shrink;
    }
    maximum[q] = top[q];
    sum[q] += added;
  }
}

static void cap_scores(float* scores, int floats, float softcap) {
  const Vec inverse = splat(1.f / softcap), cap = splat(softcap);
  for (int i = 0; i < floats; i += LANES) store(scores + i, cap * tanh_vec(load(scores + i) * inverse));
}

struct Partial {  // where a piece leaves what it found of one head: [FEW] maxima, [FEW] sums, [queries][value_dim]
  float* base;
  int64_t stride;
  float* at(int64_t i) const { return base + i * stride; }
};

template <class T>
static void attend_piece(const Attention& a, Few& few, int64_t b, int64_t h, int64_t begin, int64_t end, float* raw,
                         float* partial) {
  const Slots& s = a.slots;
  const int64_t group = a.query_heads / a.kv_heads, queries = group * a.rows;
  const int quads = int((queries + 3) / 4);
  const Head<T> head(s, a.kv_heads, b, h);
  load_queries(a, b, h, 0, a.rows, few.query);
  if (a.cosine && head.entries) turn_queries(a, head.entries, few.query);
  for (int q = 0; q < quads * 4; ++q) {
    few.maximum[q] = -INFINITY;
    few.sum[q] = 0;
  }
  std::memset(few.accumulator, 0, sizeof(float) * queries * s.value_dim);
  const int64_t* seen_until = a.query_positions ? a.query_positions + b * a.query_position_batch : nullptr;
  int64_t limit = INT64_MAX, earliest = INT64_MAX;
  if (seen_until) {
    limit = INT64_MIN;
    for (int64_t r = 0; r < a.rows; ++r) {
      if (seen_until[r] > limit) limit = seen_until[r];
      if (seen_until[r] < earliest) earliest = seen_until[r];
    }
  }
  Tile tiles[2];
  int64_t entry = head.collect(tiles[0], begin, end, limit);
  for (int turn = 0; tiles[turn].count; turn ^= 1) {
    Tile& tile = tiles[turn];
    Tile& next = tiles[turn ^ 1];
    entry = head.collect(next, entry, end, limit);
    const bool mask = seen_until && tile.newest > earliest;
    if (a.cosine) turn_keys<T>(a, tile, few.turned);
    for (int quad = 0; quad < quads; ++quad) {
      float* scores = few.scores + quad * (TILE + 8) * 4;
      const int here = int(queries - quad * 4 < 4 ? queries - quad * 4 : 4);
      if (a.cosine)
        score_queries<float>(here, few.query + quad * 4 * s.dim, s.dim, tile, tile.value, scores);
      else
        score_queries<T>(here, few.query + quad * 4 * s.dim, s.dim, tile, tile.value, scores);
      if (s.key_scale) scale_tile(head, tile, head.key_scale, s.key_scale_slot, scores);
      if (a.softcap != 0) cap_scores(scores, tile.count * 4, float(a.softcap));
      if (mask)
        for (int q = 0; q < here; ++q) {
          const int64_t until = seen_until[(quad * 4 + q) % a.rows];
          for (int t = 0; t < tile.count; ++t)
            if (tile.position[t] > until) scores[t * 4 + q] = -INFINITY;
        }
      if (raw)
        for (int t = 0; t < tile.count; ++t)
          std::memcpy(raw + (tile.entry[t] * quads + quad) * 4, scores + t * 4, 16);
      float* accumulator = few.accumulator + quad * 4 * s.value_dim;
      soften_quad(scores, tile.count, here, few.maximum + quad * 4, few.sum + quad * 4, accumulator, s.value_dim);
      if (s.value_scale) scale_tile(head, tile, head.value_scale, s.value_scale_slot, scores);
      add_queries<T>(here, scores, tile, next.count ? next : tile, s.value_dim, accumulator);
    }
  }
  std::memcpy(partial, few.maximum, sizeof few.maximum);
  std::memcpy(partial + FEW, few.sum, sizeof few.sum);
  std::memcpy(partial + 2 * FEW, few.accumulator, sizeof(float) * queries * s.value_dim);
}

// Merge the partials `first … last - 1` of one head, add the sinks, write output and LSE; `lse[q]` stays for weights.
static void merge_head(const Attention& a, int64_t b, int64_t h, const Partial& partials, int64_t first, int64_t last,
                       float* lse) {
  const int64_t group = a.query_heads / a.kv_heads, queries = group * a.rows, dim = a.slots.value_dim;
  float out[MAX_DIM];
  for (int64_t q = 0; q < queries; ++q) {
    const int64_t query_head = h * group + q / a.rows, row = q % a.rows;
    float maximum = a.sinks ? a.sinks[query_head] : -INFINITY;
    for (int64_t i = first; i < last; ++i)
      if (partials.at(i)[q] > maximum) maximum = partials.at(i)[q];
    float sum = a.sinks && maximum != -INFINITY ? expf(a.sinks[query_head] - maximum) : 0.f;
    for (int64_t d = 0; d < dim; ++d) out[d] = 0;
    for (int64_t i = first; i < last; ++i) {
      const float* partial = partials.at(i);
      if (partial[FEW + q] == 0) continue;
      const float shrink = partial[q] == maximum ? 1.f : expf(partial[q] - maximum);
      sum += shrink * partial[FEW + q];
      const float* from = partial + 2 * FEW + q * dim;
      for (int64_t d = 0; d < dim; ++d) out[d] += shrink * from[d];
    }
    lse[q] = sum == 0 ? -INFINITY : maximum + logf(sum);
    const float inverse = sum == 0 ? 0.f : 1.f / sum;
    for (int64_t d = 0; d < dim; ++d) out[d] *= inverse;
    const int64_t place = (b * a.query_heads + query_head) * a.rows + row;
    put_row(a.output, a.query_kind, place * dim, out, dim);
    if (a.lse) a.lse[place] = lse[q];
  }
}

// Softmax weights of the entries `begin … end - 1` of one head, reduced over its group, from the scores kept aside.
static void reduce_weights(const float* raw, const float* lse, int64_t group, int64_t reduction, int64_t begin,
                           int64_t end, float* weights) {
  const int quads = int((group + 3) / 4);
  float shift[FEW + LANES], block[LANES];
  for (int q = 0; q < quads * 4; ++q) shift[q] = q < group && lse[q] != -INFINITY ? lse[q] : INFINITY;
  const float factor = reduction == MEAN ? 1.f / float(group) : 1.f;
  if (quads == 1 && LANES >= 4) {
    constexpr int SLOTS = LANES / 4;
    for (int i = 4; i < LANES; ++i) shift[i] = shift[i % 4];
    const Vec by = load(shift);
    for (int64_t e = begin; e < end; e += SLOTS) {
      store(block, exp_vec(load(raw + e * 4) - by));
      for (int i = 0; i < SLOTS && e + i < end; ++i) {
        const float* w = block + i * 4;
        weights[e + i] = reduction == MAX ? fmaxf(fmaxf(w[0], w[1]), fmaxf(w[2], w[3]))
                                          : ((w[0] + w[1]) + (w[2] + w[3])) * factor;
      }
    }
    return;
  }
  for (int64_t e = begin; e < end; ++e) {
    float total = 0;
    for (int64_t q = 0; q < group; ++q) {
      const float w = expf(raw[e * quads * 4 + q] - shift[q]);
      total = reduction == MAX ? (w > total ? w : total) : total + w;
    }
    weights[e] = total * factor;
  }
}

template <class T>
static int attend_few(const Attention& a) {
  const Slots& s = a.slots;
  const int64_t heads = a.batch * a.kv_heads, group = a.query_heads / a.kv_heads, queries = group * a.rows;
  const int quads = int((queries + 3) / 4);
  const int64_t line = a.weights_entries;
  Buffer<int64_t> ends(heads + 1);  // of each head on the line of all entries
  if (!ends.data) return OUT_OF_MEMORY;
  ends.data[0] = 0;
  for (int64_t i = 0; i < heads; ++i)
    ends.data[i + 1] = ends.data[i] + (s.index ? s.index_count : (s.lengths ? s.lengths[i] : s.slots));
  const int64_t total = ends.data[heads];
  const int64_t bytes = total * (s.dim + s.value_dim) * int64_t(sizeof(T));
  const int threads = bytes < SMALL_WORK ? 1 : int(a.threads);
  int64_t pieces = threads == 1 ? 1 : threads * (bytes > LARGE_WORK ? 8 : 1);
  const int64_t length = (total + pieces - 1) / (pieces ? pieces : 1);
  // head i leaves its part of piece p at i + p: a head's partials lie side by side, and no two share a place
  const int64_t stride = 2 * FEW + queries * s.value_dim;
  Buffer<float> store_of(stride * (heads + pieces));
  Buffer<float> raw(a.weights ? heads * line * quads * 4 + LANES : 0);
  if (!store_of.data || (a.weights && !raw.data)) return OUT_OF_MEMORY;
  const Partial found{store_of.data, stride};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Few few;
#pragma omp for schedule(dynamic, 1)
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t begin = piece * length, end = begin + length < total ? begin + length : total;
      if (begin >= end) continue;
      int64_t i = 0;
      while (ends.data[i + 1] <= begin) ++i;
      for (int64_t at = begin; at < end; ++i) {
        const int64_t stop = ends.data[i + 1] < end ? ends.data[i + 1] : end;
        if (stop == at) continue;
        float* keep = a.weights ? raw.data + i * line * quads * 4 : nullptr;
        if (keep) fill(keep + (at - ends.data[i]) * quads * 4, (stop - at) * quads * 4, -INFINITY);
        attend_piece<T>(a, few, i / a.kv_heads, i % a.kv_heads, at - ends.data[i], stop - ends.data[i], keep,
                        found.at(i + piece));
        at = stop;
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < heads; ++i) {
      const int64_t begin = ends.data[i], end = ends.data[i + 1];
      float lse[FEW];
      const int64_t first = length ? begin / length : 0, last = end > begin ? (end - 1) / length + 1 : first;
      merge_head(a, i / a.kv_heads, i % a.kv_heads, found, i + first, i + last, lse);
      if (a.weights) {
        float* weights = a.weights + i * line;
        reduce_weights(raw.data + i * line * quads * 4, lse, group, a.weights_reduction, 0, end - begin, weights);
        for (int64_t e = end - begin; e < line; ++e) weights[e] = 0;
      }
    }
  }
  return OK;
}
