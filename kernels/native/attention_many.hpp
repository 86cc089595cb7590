// Attention of many query rows (prefill, chunks): bound by arithmetic, so it is laid out as matrix products.
//
// A block of queries (all heads of the group x some rows) meets tiles of slots. A tile's keys and values are widened to
// fp32 and packed into panels of COLUMNS, and serve the whole block; softmax runs along with the tiles (flash attention).

constexpr int COLUMNS = 2 * LANES;  // of a panel
constexpr int PANELS = TILE / COLUMNS;
constexpr int BLOCK = LANES == 16 ? 384 : 192;  // queries of a block, about: what the second-level cache holds

// c[row][0..COLUMNS) (+)= sum_k a[row][k] * panel[k][0..COLUMNS)
template <int ROWS, bool ADD>
static inline void multiply(const float* a, int64_t lda, const float* panel, int64_t depth, float* c, int64_t ldc) {
  Vec left[ROWS], right[ROWS];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    left[r] = ADD ? load(c + r * ldc) : Vec{};
    right[r] = ADD ? load(c + r * ldc + LANES) : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vec x = load(panel + k * COLUMNS), y = load(panel + k * COLUMNS + LANES);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const Vec w = splat(a[r * lda + k]);
      left[r] += w * x;
      right[r] += w * y;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    store(c + r * ldc, left[r]);
    store(c + r * ldc + LANES, right[r]);
  }
}

template <bool ADD>
static void multiply_rows(const float* a, int64_t lda, int64_t rows, const float* panel, int64_t depth, float* c,
                          int64_t ldc) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) multiply<6, ADD>(a + r * lda, lda, panel, depth, c + r * ldc, ldc);
  a += r * lda;
  c += r * ldc;
  switch (rows - r) {
    case 5: return multiply<5, ADD>(a, lda, panel, depth, c, ldc);
    case 4: return multiply<4, ADD>(a, lda, panel, depth, c, ldc);
    case 3: return multiply<3, ADD>(a, lda, panel, depth, c, ldc);
    case 2: return multiply<2, ADD>(a, lda, panel, depth, c, ldc);
    case 1: return multiply<1, ADD>(a, lda, panel, depth, c, ldc);
    default: return;
  }
}

// to[j][i] = from[i][j], four by four
static inline void turn_four(const float* from, int64_t stride, float* to, int64_t to_stride) {
#if defined(__x86_64__)
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + stride);
  __m128 c = _mm_loadu_ps(from + 2 * stride), d = _mm_loadu_ps(from + 3 * stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a);
  _mm_storeu_ps(to + to_stride, b);
  _mm_storeu_ps(to + 2 * to_stride, c);
  _mm_storeu_ps(to + 3 * to_stride, d);
#else
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 4; ++i) to[j * to_stride + i] = from[i * stride + j];
#endif
}

// panels[slot / COLUMNS][d][slot % COLUMNS] = key[slot][d], zeros beyond the tile's last slot
template <class T>
static void pack_keys(const Head<T>& head, const Tile& tile, int64_t dim, float* panels) {
  float rows[COLUMNS][MAX_DIM];
  for (int first = 0; first < tile.count; first += COLUMNS) {
    float* panel = panels + int64_t(first) * dim;
    for (int c = 0; c < COLUMNS; ++c) {
      if (first + c < tile.count)
        widen_row(static_cast<const T*>(tile.key[first + c]), rows[c], dim,
                  head.key_scale ? head.key_scale_of(tile, first + c) : 1.f);
      else
        fill(rows[c], dim, 0.f);
    }
    for (int c = 0; c < COLUMNS; c += 4) {
      int64_t d = 0;
      for (; d + 4 <= dim; d += 4) turn_four(rows[c] + d, MAX_DIM, panel + d * COLUMNS + c, COLUMNS);
      for (; d < dim; ++d)
        for (int i = 0; i < 4; ++i) panel[d * COLUMNS + c + i] = rows[c + i][d];
    }
  }
}

// panels[d / COLUMNS][slot][d % COLUMNS] = value[slot][d], zeros beyond dim
template <class T>
static void pack_values(const Head<T>& head, const Tile& tile, int64_t dim, float* panels) {
  float row[MAX_DIM + COLUMNS];
  for (int t = 0; t < tile.count; ++t) {
    widen_row(static_cast<const T*>(tile.value[t]), row, dim, head.value_scale ? head.value_scale_of(tile, t) : 1.f);
    fill(row + dim, COLUMNS, 0.f);
    for (int64_t d = 0; d < dim; d += COLUMNS) {
      float* to = panels + d * TILE + int64_t(t) * COLUMNS;
      store(to, load(row + d));
      store(to + LANES, load(row + d + LANES));
    }
  }
}

// One tile's step of the running softmax of one query: scores become exp(score - maximum), zeros past `count`.
static inline void soften_row(float* scores, int count, int padded, float& maximum, float& sum, float* accumulator,
                              int64_t dim) {
  for (int i = count; i < padded; ++i) scores[i] = -INFINITY;
  Vec best = splat(maximum);
  for (int i = 0; i < padded; i += LANES) best = larger(load(scores + i), best);
  const float top = max_lanes(best);
  const Vec shift = splat(top == -INFINITY ? 0.f : top);
  Vec total = Vec{};
  for (int i = 0; i < padded; i += LANES) {
    const Vec p = exp_vec(load(scores + i) - shift);
    total += p;
    store(scores + i, p);
  }
  if (top > maximum) {
    if (maximum != -INFINITY) {
      const float shrink = expf(maximum - top);
      sum *= shrink;
      for (int64_t d = 0; d < dim; d += LANES) store(accumulator + d, load(accumulator + d) * splat(shrink));
    }
    maximum = top;
  }
  sum += sum_lanes(total);
}

struct Rows {  // one block of query rows of one KV head
  int64_t b, h, first, count;
  const int64_t* until;          // query positions of the block's rows, or null
  int64_t earliest, latest;      // of them

  Rows(const Attention& a, int64_t b_, int64_t h_, int64_t first_, int64_t count_)
      : b(b_), h(h_), first(first_), count(count_), until(nullptr), earliest(INT64_MAX), latest(INT64_MAX) {
    if (!a.query_positions) return;
    until = a.query_positions + b * a.query_position_batch + first;
    latest = INT64_MIN;
    for (int64_t r = 0; r < count; ++r) {
      if (until[r] > latest) latest = until[r];
      if (until[r] < earliest) earliest = until[r];
    }
  }
  // scores[query][slot]: -inf where the slot is newer than the query
  void mask(const Tile& tile, int64_t queries, float* scores) const {
    if (!until || tile.newest <= earliest) return;
    for (int64_t q = 0; q < queries; ++q)
      for (int t = 0; t < tile.count; ++t)
        if (tile.position[t] > until[q % count]) scores[q * TILE + t] = -INFINITY;
  }
};

static inline int64_t rows_of_block(int64_t group, int64_t rows) {
  const int64_t fit = BLOCK / group > 1 ? BLOCK / group : 1;
  return fit < rows ? fit : rows;
}

static inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

template <class T>
static void scores_of_tile(const Attention& a, const Head<T>& head, const Rows& rows, const Tile& tile,
                           const float* query, int64_t queries, float* keys, float* scores) {
  const int64_t dim = a.slots.dim;
  pack_keys<T>(head, tile, dim, keys);
  for (int c = 0; c < tile.count; c += COLUMNS)
    multiply_rows<false>(query, dim, queries, keys + int64_t(c) * dim, dim, scores + c, TILE);
  if (a.softcap != 0) cap_scores(scores, int(queries * TILE), float(a.softcap));
  rows.mask(tile, queries, scores);
}

template <class T>
static int attend_many(const Attention& a) {
  const Slots& s = a.slots;
  const int64_t group = a.query_heads / a.kv_heads, step = rows_of_block(group, a.rows);
  const int64_t blocks = (a.rows + step - 1) / step, tasks = a.batch * a.kv_heads * blocks;
  const int64_t queries_most = group * step, value_dim = round_up(s.value_dim, COLUMNS);
  const int64_t scratch = queries_most * (s.dim + value_dim + TILE + 2) + TILE * (s.dim + value_dim);
  Buffer<float> buffer(scratch * a.threads);
  if (!buffer.data) return OUT_OF_MEMORY;
#pragma omp parallel num_threads(int(a.threads)) if (a.threads > 1 && tasks > 1)
  {
    float* query = buffer.data + scratch * thread_number();
    float* accumulator = query + queries_most * s.dim;
    float* scores = accumulator + queries_most * value_dim;
    float* maximum = scores + queries_most * TILE;
    float* sum = maximum + queries_most;
    float* keys = sum + queries_most;
    float* values = keys + TILE * s.dim;
    Tile tile;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      // the last rows see most: they go first, so that no thread is left with a long block at the end
      const int64_t block = blocks - 1 - task / (a.batch * a.kv_heads), i = task % (a.batch * a.kv_heads);
      const int64_t first = block * step, count = a.rows - first < step ? a.rows - first : step;
      const Rows rows(a, i / a.kv_heads, i % a.kv_heads, first, count);
      const int64_t queries = group * count;
      const Head<T> head(s, a.kv_heads, rows.b, rows.h);
      load_queries(a, rows.b, rows.h, first, count, query);
      fill(accumulator, queries * value_dim, 0.f);
      for (int64_t q = 0; q < queries; ++q) {
        maximum[q] = a.sinks ? a.sinks[rows.h * group + q / count] : -INFINITY;
        sum[q] = maximum[q] == -INFINITY ? 0.f : 1.f;
      }
      for (int64_t entry = 0; entry < head.entries;) {
        entry = head.collect(tile, entry, head.entries, rows.latest);
        if (!tile.count) break;
        scores_of_tile<T>(a, head, rows, tile, query, queries, keys, scores);
        const int padded = int(round_up(tile.count, LANES));
        for (int64_t q = 0; q < queries; ++q)
          soften_row(scores + q * TILE, tile.count, padded, maximum[q], sum[q], accumulator + q * value_dim, value_dim);
        pack_values<T>(head, tile, s.value_dim, values);
        for (int64_t d = 0; d < value_dim; d += COLUMNS)
          multiply_rows<true>(scores, TILE, queries, values + d * TILE, tile.count, accumulator + d, value_dim);
      }
      for (int64_t q = 0; q < queries; ++q) {
        const int64_t place = (rows.b * a.query_heads + rows.h * group + q / count) * a.rows + first + q % count;
        float* out = accumulator + q * value_dim;
        const float inverse = sum[q] == 0 ? 0.f : 1.f / sum[q];
        for (int64_t d = 0; d < s.value_dim; ++d) out[d] *= inverse;
        put_row(a.output, a.query_kind, place * s.value_dim, out, s.value_dim);
        if (a.lse) a.lse[place] = sum[q] == 0 ? -INFINITY : maximum[q] + logf(sum[q]);
      }
    }
  }
  return OK;
}

template <class T>
static int attend_kind(const Attention& a) {
  const int64_t group = a.query_heads / a.kv_heads;
  return a.weights || group * a.rows <= FEW ? attend_few<T>(a) : attend_many<T>(a);
}

// Arguments checked and brought to one form. Slots without positions have their numbers for positions; to these, causal
// rows get query positions that fit. Without positions, a row of ragged or listed slots sees all or, where its own
// position is negative, nothing; a row of plain dense slots sees all.
struct Prepared {
  Attention a;
  Buffer<int64_t> made;
  int status;
  explicit Prepared(const Attention& given) : a(given), made(given.batch * given.rows) {
    const Slots& s = a.slots;
    status = made.data ? check_slots(s, a.batch, a.kv_heads) : OUT_OF_MEMORY;
    const bool turned = a.cosine != nullptr;
    if (turned && !status && (s.starts || (s.index ? s.index_count : s.slots) > a.table_rows)) status = INDEX_OUT_OF_RANGE;
    if (status || s.positions || !(a.causal || a.query_positions)) return;
    if (!a.causal && !s.starts && !s.index) {
      a.query_positions = nullptr;
      return;
    }
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t r = 0; r < a.rows; ++r) {
        const bool padding = !a.causal && a.query_positions[b * a.query_position_batch + r] < 0;
        made.data[b * a.rows + r] = a.causal ? s.slots - a.rows + r : (padding ? -1 : INT64_MAX);
      }
    a.query_positions = made.data;
    a.query_position_batch = a.rows;
  }
};

static int attention(const Attention& given) {
  const Prepared prepared(given);
  if (prepared.status) return prepared.status;
  const Attention& a = prepared.a;
  switch (a.slots.kind) {
    case BF16: return attend_kind<BFloat16>(a);
    case FP16: return attend_kind<Float16>(a);
    case INT8: return attend_kind<int8_t>(a);
    default: return attend_kind<float>(a);
  }
}
