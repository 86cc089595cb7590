// Attention mass: column sums of the softmax over a set of query rows, in memory linear in the slots.
//
// The keys of one KV head are packed once. A strip (a few rows of every head of the group x all slots they see) is scored
// as a matrix product, made a softmax in place and added to column sums. So each score is computed once, with its noise.
// Strips fall into a fixed number of classes with sums of their own, added up in the order of the classes: the result is
// the same for any number of threads.

constexpr int CLASSES = 16;
constexpr int STRIP = 24;  // queries of a strip, at most (or one row of a larger group): whole blocks of `multiply_rows`

static inline uint32_t mix(uint32_t x) {  // the finalizer of MurmurHash3
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ (x >> 16);
}

struct Noise {  // of one query row: see kvpress.kernels.attention_mass.noise, the specification
  uint32_t first, second;
  Noise(int64_t seed, int64_t query_head, int64_t position) {
    const uint32_t base = mix(mix(uint32_t(seed)) ^ uint32_t(uint64_t(seed) >> 32));
    const uint32_t head = mix(base + uint32_t(query_head + 1) * 0x9e3779b9u);
    first = mix(head ^ (uint32_t(position) * 0xc2b2ae3du));
    second = mix(first + 0x27d4eb2fu);
  }
};

constexpr int ABREAST = 4;  // vectors of variates made side by side

// Standard exponential variates of ABREAST * LANES keys whose positions times 0x9e3779b9 are `weyl`; Gumbel noise is -log
// of them, which is what `cooled` asks for with its sign turned.
template <bool COOLED>
static inline void variates_of(const uint32_t* weyl, const Noise& noise, float* to) {
  VecBits x[ABREAST];
  Vec variate[ABREAST];
  EACH(i, ABREAST) x[i] = *reinterpret_cast<const VecBitsAny*>(weyl + i * LANES) + noise.first;
  EACH(i, ABREAST) x[i] ^= x[i] >> 16;
  EACH(i, ABREAST) x[i] *= 0x85ebca6bu;
  EACH(i, ABREAST) x[i] ^= x[i] >> 13;
  EACH(i, ABREAST) x[i] *= 0xc2b2ae35u;
  EACH(i, ABREAST) x[i] ^= x[i] >> 16;
  EACH(i, ABREAST) x[i] = (x[i] ^ noise.second) * 0x9e3779b1u;
  EACH(i, ABREAST) x[i] ^= x[i] >> 15;
  EACH(i, ABREAST) variate[i] = __builtin_convertvector(reinterpret_cast<VecInt>(x[i] >> 9), Vec);
  EACH(i, ABREAST) variate[i] = (variate[i] + splat(0.5f)) * splat(1.f / 8388608.f);
  log_each(variate);
  EACH(i, ABREAST) variate[i] = -variate[i];
  if (COOLED) log_each(variate);
  EACH(i, ABREAST) store(to + i * LANES, variate[i]);
}

// exp((score - shift) / temperature) in place, with noise where there is any; returns the sums by lane. Numbers without
// a branch between them are made in loops of their own: the processor then works on many at a time.
template <bool NOISY, bool COOLED>
static Vec soften_scores(float* scores, const uint32_t* weyl, int64_t count, float shift, float coolness,
                         const Noise& noise) {
  constexpr int64_t CHUNK = 8 * TILE;
  float variates[CHUNK];
  Vec total = Vec{};
  for (int64_t first = 0; first < count; first += CHUNK) {
    const int64_t here = count - first < CHUNK ? count - first : CHUNK;
    if (NOISY)
      for (int64_t t = 0; t < here; t += ABREAST * LANES) variates_of<COOLED>(weyl + first + t, noise, variates + t);
    for (int64_t t = 0; t < here; t += LANES) {
      Vec x = load(scores + first + t) - splat(shift);
      if (NOISY && COOLED) x = x - load(variates + t);
      if (COOLED) x = x * splat(coolness);
      x = exp_vec(x);
      if (NOISY && !COOLED) x = x / load(variates + t);
      total += x;
      store(scores + first + t, x);
    }
  }
  return total;
}

struct Panels {  // the packed slots of one KV head
  int64_t tiles;
  float* keys;           // [tile][TILE / COLUMNS][dim][COLUMNS]
  uint32_t* weyl;        // [tile][TILE]: positions times 0x9e3779b9
  int64_t* position;     // [tile][TILE]
  int64_t* entry;        // [tile][TILE]
  int64_t* count;        // [tile]
  int64_t* newest;
  int64_t* oldest;
};

template <class T>
static void score_strip(const Mass& m, const Rows& rows, const int64_t* noise_positions, const Panels& panels,
                        float* query, float* strip, int64_t width, float* sums) {
  const Attention& a = m.attention;
  const int64_t group = a.query_heads / a.kv_heads, queries = group * rows.count, dim = a.slots.dim;
  const float coolness = float(1.0 / m.temperature);
  load_queries(a, rows.b, rows.h, rows.first, rows.count, query);
  float maximum[STRIP * 4];
  for (int64_t q = 0; q < queries; ++q) maximum[q] = -INFINITY;
  for (int64_t k = 0; k < panels.tiles; ++k) {
    if (panels.oldest[k] > rows.latest) continue;
    float* scores = strip + k * TILE;
    const int64_t count = panels.count[k];
    for (int64_t c = 0; c < count; c += COLUMNS)
      multiply_rows<false>(query, dim, queries, panels.keys + (k * TILE + c) * dim, dim, scores + c, width);
    const bool mask = rows.until && panels.newest[k] > rows.earliest;
    for (int64_t q = 0; q < queries; ++q) {
      float* row = scores + q * width;
      if (a.softcap != 0) cap_scores(row, int(count), float(a.softcap));
      for (int64_t t = count; t < TILE; ++t) row[t] = -INFINITY;
      if (mask) {
        const int64_t until = rows.until[q % rows.count];
        for (int64_t t = 0; t < count; ++t)
          if (panels.position[k * TILE + t] > until) row[t] = -INFINITY;
      }
      Vec best = splat(maximum[q]);
      for (int64_t t = 0; t < TILE; t += LANES) best = larger(load(row + t), best);
      maximum[q] = max_lanes(best);
    }
  }
  const bool cooled = m.temperature != 1.0;
  const auto soften = m.noise ? (cooled ? soften_scores<true, true> : soften_scores<true, false>)
                              : (cooled ? soften_scores<false, true> : soften_scores<false, false>);
  float inverse[STRIP * 4];
  for (int64_t q = 0; q < queries; ++q) {
    const int64_t query_head = rows.h * group + q / rows.count, r = q % rows.count;
    const int64_t position = noise_positions ? noise_positions[rows.first + r] : rows.first + r;
    const Noise noise(m.seed, query_head, position);
    float shift = maximum[q] == -INFINITY ? 0.f : maximum[q];
    if (a.lse) {
      const float given = a.lse[(rows.b * a.query_heads + query_head) * a.rows + rows.first + r];
      shift = given == -INFINITY ? 0.f : given;
    }
    Vec total = Vec{};
    for (int64_t k = 0; k < panels.tiles;) {
      int64_t last = k;  // of a run of tiles that are seen
      while (last < panels.tiles && panels.oldest[last] <= rows.latest) ++last;
      total += soften(strip + q * width + k * TILE, panels.weyl + k * TILE, (last - k) * TILE, shift, coolness, noise);
      k = last + 1;
    }
    float sum = sum_lanes(total);
    if (a.sinks) sum += expf((a.sinks[query_head] - shift) * coolness);
    inverse[q] = a.lse ? 1.f : (sum == 0 ? 0.f : 1.f / sum);
    if (m.row_weights) inverse[q] *= m.row_weights[rows.b * m.row_weights_batch + rows.first + r];
  }
  for (int64_t k = 0; k < panels.tiles; ++k) {
    if (panels.oldest[k] > rows.latest) continue;
    for (int64_t g = 0; g < group; ++g) {
      float* to = sums + g * width + k * TILE;
      for (int64_t t = 0; t < TILE; t += LANES) {
        Vec total = load(to + t);
        for (int64_t r = 0; r < rows.count; ++r) {
          const int64_t q = g * rows.count + r;
          total += load(strip + q * width + k * TILE + t) * splat(inverse[q]);
        }
        store(to + t, total);
      }
    }
  }
}

template <class T>
static int mass_kind(const Mass& m, const Attention& given) {
  const Attention& a = m.attention;
  const Slots& s = a.slots;
  const int64_t group = a.query_heads / a.kv_heads, dim = s.dim, out_slots = a.weights_entries;
  int64_t longest = s.lengths ? 0 : s.slots;
  for (int64_t i = 0; s.lengths && i < a.batch * a.kv_heads; ++i) longest = s.lengths[i] > longest ? s.lengths[i] : longest;
  const int64_t most = (longest + TILE - 1) / TILE, width = most * TILE;
  const int64_t step = group < STRIP ? STRIP / group : 1, blocks = (a.rows + step - 1) / step;
  const int64_t classes = blocks < CLASSES ? blocks : CLASSES;
  if (group * step > STRIP * 4) return OUT_OF_MEMORY;  // Python refuses such groups
  Buffer<float> keys(width * dim), strips(width * group * step * a.threads), sums(width * group * classes),
      queries(group * step * dim * a.threads);
  Buffer<uint32_t> weyl(width);
  Buffer<int64_t> position(width), entry(width), about(3 * most);
  if (!keys.data || !strips.data || !sums.data || !queries.data || !weyl.data || !position.data || !entry.data || !about.data)
    return OUT_OF_MEMORY;
  Panels panels{0, keys.data, weyl.data, position.data, entry.data, about.data, about.data + most, about.data + 2 * most};
  for (int64_t i = 0; i < a.batch * a.kv_heads; ++i) {
    const int64_t b = i / a.kv_heads, h = i % a.kv_heads;
    const Head<T> head(s, a.kv_heads, b, h);
    const int64_t cuts = (head.entries + TILE - 1) / TILE;  // a tile of each TILE entries, less the empty ones
    panels.tiles = cuts;
    const int64_t* asked = given.query_positions ? given.query_positions + b * given.query_position_batch : nullptr;
#pragma omp parallel num_threads(int(a.threads)) if (a.threads > 1)
    {
      Tile tile;
#pragma omp for schedule(static)
      for (int64_t k = 0; k < cuts; ++k) {
        const int64_t end = (k + 1) * TILE < head.entries ? (k + 1) * TILE : head.entries;
        head.collect(tile, k * TILE, end, INT64_MAX);
        panels.count[k] = tile.count;
        panels.newest[k] = tile.newest;
        panels.oldest[k] = tile.count ? tile.oldest : INT64_MAX;
        if (tile.count) pack_keys<T>(head, tile, dim, panels.keys + k * TILE * dim);
        for (int t = 0; t < TILE; ++t) {
          panels.position[k * TILE + t] = t < tile.count ? tile.position[t] : INT64_MAX;
          panels.entry[k * TILE + t] = t < tile.count ? tile.entry[t] : -1;
          panels.weyl[k * TILE + t] = t < tile.count ? uint32_t(tile.position[t]) * 0x9e3779b9u : 0;
        }
      }
      float* strip = strips.data + width * group * step * thread_number();
      float* query = queries.data + group * step * dim * thread_number();
#pragma omp for schedule(dynamic, 1)
      for (int64_t c = 0; c < classes; ++c) {
        float* own = sums.data + width * group * c;
        fill(own, width * group, 0.f);
        for (int64_t block = c; block < blocks; block += classes) {
          const int64_t first = block * step, count = a.rows - first < step ? a.rows - first : step;
          const Rows rows(a, b, h, first, count);
          score_strip<T>(m, rows, asked, panels, query, strip, width, own);
        }
      }
#pragma omp for schedule(static)
      for (int64_t g = 0; g < group; ++g) {
        float* out = a.weights + (b * a.query_heads + h * group + g) * out_slots;
        fill(out, out_slots, 0.f);
        for (int64_t t = 0; t < cuts * TILE; ++t) {
          if (panels.entry[t] < 0) continue;
          float total = 0;
          for (int64_t c = 0; c < classes; ++c) total += sums.data[(c * group + g) * width + t];
          out[panels.entry[t]] = total;
        }
      }
    }
  }
  return OK;
}

static int attention_mass(const Mass& given) {
  const Prepared prepared(given.attention);
  if (prepared.status) return prepared.status;
  Mass m = given;
  m.attention = prepared.a;
  switch (m.attention.slots.kind) {
    case BF16: return mass_kind<BFloat16>(m, given.attention);
    case FP16: return mass_kind<Float16>(m, given.attention);
    case INT8: return mass_kind<int8_t>(m, given.attention);
    default: return mass_kind<float>(m, given.attention);
  }
}
