// Rows of int4: two codes a byte, each plus 8, the even channel in the low half. Before it is rounded, a row is turned by a
// Walsh-Hadamard matrix, so that no channel stands out; queries are turned alike and rounded to int8, so that products are integers.

template <class T>
constexpr bool IS_INT4 = std::is_same<T, Int4<false>>::value || std::is_same<T, Int4<true>>::value;

struct Int4Query {  // lies where its fp32 row lay, which is no shorter
  float scale;
  int32_t offset;  // what the products hold too much, as codes are stored plus 8
  const int8_t* codes() const { return reinterpret_cast<const int8_t*>(this + 1); }  // of even channels, then of odd ones
};

// Make of a query row in fp32 an Int4Query.
static inline void round_query(float* row, int64_t dim) {
  int8_t codes[MAX_DIM];
  mix_channels(row, dim);
  const float scale = round_row(row, dim, 127, codes);
  Int4Query* to = reinterpret_cast<Int4Query*>(row);
  int8_t* apart = reinterpret_cast<int8_t*>(to + 1);
  int32_t sum = 0;
  for (int64_t d = 0; d < dim; ++d) {
    apart[d % 2 * (dim / 2) + d / 2] = codes[d];
    sum += codes[d];
  }
  to->scale = scale;
  to->offset = 8 * sum;
}

#if LANES == 16
typedef __m512i Words;
#define WORDS(name) _mm512_##name
#define LOW_BITS(x, mask) _mm512_and_si512(x, mask)
#elif LANES == 8
typedef __m256i Words;
#define WORDS(name) _mm256_##name
#define LOW_BITS(x, mask) _mm256_and_si256(x, mask)
#endif

// Where rows lie: those that a tile lists, or rows side by side, BYTES apart or, where that is 0, `step`.
struct ListedRows {
  const void* const* key;
  const void* const* ahead;  // rows that are needed next
  ListedRows from(int t) const { return {key + t, ahead + t}; }
  const char* operator[](int t) const { return static_cast<const char*>(key[t]); }
  void fetch_ahead() const {
    for (int i = 0; i < LANES; i += 2) __builtin_prefetch(ahead[i]);
  }
};

template <int BYTES>
struct RunRows {
  static constexpr int64_t AHEAD = 4096;  // bytes: memory answers while as many are worked on
  const char* first;
  int64_t step;
  int64_t width() const { return BYTES ? BYTES : step; }
  RunRows from(int t) const {
    const char* row = first + t * width();
    asm("" : "+r"(row));  // or each of the rows behind it has a register of its own
    return {row, step};
  }
  const char* operator[](int t) const { return first + t * width(); }
  void fetch_ahead() const {  // behind the last row nothing is read: a hint does no harm
    const int64_t line = width() < 64 ? 64 : width();
    for (int64_t i = 0; i < LANES * width(); i += line) __builtin_prefetch(first + AHEAD + i);
  }
};

#if LANES >= 8
static inline int32_t word_at(const void* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

// COUNT words of four bytes of the rows r, r + 4, … from `byte` on, zeros behind them.
template <int COUNT, class Rows>
static inline Words rows_apart(const Rows& rows, int r, int64_t byte) {
  const auto part = [&](int row) {
    const char* from = rows[row] + byte;
    const __m128i* wide = reinterpret_cast<const __m128i*>(from);
    if (COUNT == 4) return _mm_loadu_si128(wide);
    if (COUNT == 3) return _mm_insert_epi32(_mm_loadl_epi64(wide), word_at(from + 8), 2);
    return COUNT == 2 ? _mm_loadl_epi64(wide) : _mm_cvtsi32_si128(word_at(from));
  };
  const __m256i first = _mm256_inserti128_si256(_mm256_castsi128_si256(part(r)), part(r + 4), 1);
#if LANES == 16
  const __m256i second = _mm256_inserti128_si256(_mm256_castsi128_si256(part(r + 8)), part(r + 12), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
#else
  return first;
#endif
}

#if LANES == 16 && !defined(__clang__)
typedef int32_t Word __attribute__((may_alias));
// Products of four bytes each with those of a query are added to `sums`. Written out, as not all that this is compiled for have it.
static inline void add_products(Words& sums, Words bytes, const int8_t* query) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(bytes), "m"(*reinterpret_cast<const Word*>(query)));
}
#else
static inline void add_products(Words&, Words, const int8_t*) {}  // no level in use has it
#endif

// The products of COUNT words of the first LANES rows are added to sums[query][row]. So many fit in 16 bits: 15 * 127 * 2 * 8 < 2^15.
template <bool VNNI, int QUERIES, int COUNT, class Rows>
static inline void add_int4(const Int4Query* const* query, int64_t half, const Rows& rows, int64_t byte, Words* sums) {
  Words x[4], word[4], products[QUERIES];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) x[i] = rows_apart<COUNT>(rows, i, byte);
  const Words a = WORDS(unpacklo_epi32)(x[0], x[1]), b = WORDS(unpacklo_epi32)(x[2], x[3]);
  const Words c = WORDS(unpackhi_epi32)(x[0], x[1]), d = WORDS(unpackhi_epi32)(x[2], x[3]);
  word[0] = WORDS(unpacklo_epi64)(a, b);  // four bytes of each row
  word[1] = WORDS(unpackhi_epi64)(a, b);
  word[2] = WORDS(unpacklo_epi64)(c, d);
  word[3] = WORDS(unpackhi_epi64)(c, d);
  const Words nibble = WORDS(set1_epi8)(15), one = WORDS(set1_epi16)(1);
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i) {
    const Words even = LOW_BITS(word[i], nibble), odd = LOW_BITS(WORDS(srli_epi16)(word[i], 4), nibble);
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q) {
      const int8_t* codes = query[q]->codes() + byte + 4 * i;
      if (VNNI) {
        add_products(sums[q], even, codes);
        add_products(sums[q], odd, codes + half);
        continue;
      }
      const Words both = WORDS(add_epi16)(WORDS(maddubs_epi16)(even, WORDS(set1_epi32)(word_at(codes))),
                                          WORDS(maddubs_epi16)(odd, WORDS(set1_epi32)(word_at(codes + half))));
      products[q] = i ? WORDS(add_epi16)(products[q], both) : both;
    }
  }
  if (VNNI) return;
#pragma GCC unroll 4
  for (int q = 0; q < QUERIES; ++q) sums[q] = WORDS(add_epi32)(sums[q], WORDS(madd_epi16)(products[q], one));
}

template <bool VNNI, int QUERIES, class Rows>
static inline __attribute__((always_inline)) void multiply_int4(const Int4Query* const* query, int64_t dim, const Rows& all, int count,
                                                                const float* scale, float* planes) {
  const int64_t bytes = dim / 2;
  for (int t = 0; t < count; t += LANES) {
    const Rows rows = all.from(t);
    Words sums[QUERIES];
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q) sums[q] = WORDS(set1_epi32)(-query[q]->offset);
    int64_t byte = 0;
#pragma GCC unroll 4
    for (; byte + 16 <= bytes; byte += 16) add_int4<VNNI, QUERIES, 4>(query, bytes, rows, byte, sums);
    switch (bytes - byte) {
      case 4: add_int4<VNNI, QUERIES, 1>(query, bytes, rows, byte, sums); break;
      case 8: add_int4<VNNI, QUERIES, 2>(query, bytes, rows, byte, sums); break;
      case 12: add_int4<VNNI, QUERIES, 3>(query, bytes, rows, byte, sums);
    }
    rows.fetch_ahead();
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q) {
      const Vec product = __builtin_convertvector(reinterpret_cast<VecInt>(sums[q]), Vec);
      store(planes + q * TILE + t, product * (load(scale + t) * splat(query[q]->scale)));
    }
  }
}
#else
template <bool VNNI, int QUERIES, class Rows>
static void multiply_int4(const Int4Query* const* query, int64_t dim, const Rows& rows, int count, const float* scale,
                          float* planes) {
  const int64_t half = dim / 2;
  for (int t = 0; t < count; ++t) {
    const uint8_t* key = reinterpret_cast<const uint8_t*>(rows[t]);
    for (int q = 0; q < QUERIES; ++q) {
      const int8_t* codes = query[q]->codes();
      int32_t sum = 0;
      for (int64_t i = 0; i < half; ++i) sum += (key[i] & 15) * codes[i] + (key[i] >> 4) * codes[half + i];
      planes[q * TILE + t] = float(sum - query[q]->offset) * (scale[t] * query[q]->scale);
    }
  }
}
#endif

// planes[query][slot] of up to four queries [query][dim], which are ready, by the rows' factors `scale`, a multiple of LANES of them.
template <bool VNNI, class Rows>
static inline __attribute__((always_inline)) void score_int4(const float* query, int queries, int64_t dim, const Rows& rows, int count,
                                                             const float* scale, float* planes) {
  const Int4Query* ready[4];
  for (int q = 0; q < queries; ++q) ready[q] = reinterpret_cast<const Int4Query*>(query + q * dim);
  switch (queries) {
    case 1: return multiply_int4<VNNI, 1>(ready, dim, rows, count, scale, planes);
    case 2: return multiply_int4<VNNI, 2>(ready, dim, rows, count, scale, planes);
    case 3: return multiply_int4<VNNI, 3>(ready, dim, rows, count, scale, planes);
    default: multiply_int4<VNNI, 4>(ready, dim, rows, count, scale, planes);
  }
}

// As score_planes of other kinds.
template <bool VNNI>
static void score_planes(const Head<Int4<VNNI>>& head, const float* query, int queries, const Tile& tile, const void* const* ahead,
                         float* planes) {
  float scale[TILE];
  key_scales(head, tile, scale);
  score_int4<VNNI>(query, queries, head.slots.dim, ListedRows{tile.key, ahead}, tile.count, scale, planes);
}

// As score_planes, of the TILE slots from `first` on: their rows are found without a list.
template <bool VNNI>
static void score_run(const Head<Int4<VNNI>>& head, const float* query, int queries, int64_t first, float* planes) {
  const Slots& s = head.slots;
  const float* from = head.key_scale + first * s.key_scale_slot;
  float apart[TILE];
  if (s.key_scale_slot != 1)
    for (int t = 0; t < TILE; ++t) apart[t] = from[t * s.key_scale_slot];
  const float* scale = s.key_scale_slot == 1 ? from : apart;
  const char* keys = reinterpret_cast<const char*>(head.keys + first * s.key_slot);
  if (s.key_slot == 32 && s.dim == 64) return score_int4<VNNI>(query, queries, 64, RunRows<32>{keys, 32}, TILE, scale, planes);
  if (s.key_slot == 64 && s.dim == 128) return score_int4<VNNI>(query, queries, 128, RunRows<64>{keys, 64}, TILE, scale, planes);
  score_int4<VNNI>(query, queries, s.dim, RunRows<0>{keys, s.key_slot}, TILE, scale, planes);
}
