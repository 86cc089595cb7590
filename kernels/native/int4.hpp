// Rows of int4: two codes a byte, each plus 8, the even channel in the low half. Before it is rounded, a row is turned by a
// Walsh-Hadamard matrix, so that no channel stands out; queries are turned alike and rounded to int8, so that products are integers.

struct Int4Query {  // lies where its fp32 row lay, which is no shorter
  float scale;
  int32_t offset;  // what the products hold too much, as codes are stored plus 8
  const int8_t* codes() const { return reinterpret_cast<const int8_t*>(this + 1); }  // of even channels, then of odd ones
};

// A query row as the keys' kind is multiplied with: only int4 changes it.
template <class T>
static inline void ready_query(float*, int64_t) {}

template <>
inline void ready_query<Int4>(float* row, int64_t dim) {
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

#if LANES >= 8
static inline int32_t word_at(const void* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

// COUNT words of four bytes of the rows r, r + 4, … from `byte` on, zeros behind them.
template <int COUNT>
static inline Words rows_apart(const void* const* key, int r, int64_t byte) {
  const auto part = [&](int row) {
    const char* from = static_cast<const char*>(key[row]) + byte;
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

// The products of COUNT words of LANES rows are added to sums[query][row]. So many fit in 16 bits: 15 * 127 * 2 * 8 < 2^15.
template <int QUERIES, int COUNT>
static inline void add_int4(const Int4Query* const* query, int64_t half, const void* const* key, int64_t byte, Words* sums) {
  Words x[4], word[4], products[QUERIES];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) x[i] = rows_apart<COUNT>(key, i, byte);
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
      const Words both = WORDS(add_epi16)(WORDS(maddubs_epi16)(even, WORDS(set1_epi32)(word_at(codes))),
                                          WORDS(maddubs_epi16)(odd, WORDS(set1_epi32)(word_at(codes + half))));
      products[q] = i ? WORDS(add_epi16)(products[q], both) : both;
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < QUERIES; ++q) sums[q] = WORDS(add_epi32)(sums[q], WORDS(madd_epi16)(products[q], one));
}

template <int QUERIES>
static void multiply_int4(const Int4Query* const* query, int64_t dim, const Tile& tile, const void* const* ahead, int32_t* out) {
  const int64_t bytes = dim / 2;
  for (int t = 0; t < tile.count; t += LANES) {
    Words sums[QUERIES];
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q) sums[q] = Words{};
    int64_t byte = 0;
    for (; byte + 16 <= bytes; byte += 16) add_int4<QUERIES, 4>(query, bytes, tile.key + t, byte, sums);
    switch (bytes - byte) {
      case 4: add_int4<QUERIES, 1>(query, bytes, tile.key + t, byte, sums); break;
      case 8: add_int4<QUERIES, 2>(query, bytes, tile.key + t, byte, sums); break;
      case 12: add_int4<QUERIES, 3>(query, bytes, tile.key + t, byte, sums);
    }
    for (int i = 0; i < LANES; i += 2) __builtin_prefetch(ahead[t + i]);
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q) std::memcpy(out + q * TILE + t, &sums[q], sizeof(Words));
  }
}
#else
template <int QUERIES>
static void multiply_int4(const Int4Query* const* query, int64_t dim, const Tile& tile, const void* const*, int32_t* out) {
  const int64_t half = dim / 2;
  for (int t = 0; t < tile.count; ++t) {
    const uint8_t* key = static_cast<const uint8_t*>(tile.key[t]);
    for (int q = 0; q < QUERIES; ++q) {
      const int8_t* codes = query[q]->codes();
      int32_t sum = 0;
      for (int64_t i = 0; i < half; ++i) sum += (key[i] & 15) * codes[i] + (key[i] >> 4) * codes[half + i];
      out[q * TILE + t] = sum;
    }
  }
}
#endif

// As score_planes of other kinds; `queries` are ready.
static void score_planes(const Head<Int4>& head, const float* query, int queries, const Tile& tile, const void* const* ahead,
                         float* planes) {
  const int64_t dim = head.slots.dim;
  const Int4Query* ready[4];
  for (int q = 0; q < queries; ++q) ready[q] = reinterpret_cast<const Int4Query*>(query + q * dim);
  int32_t products[4 * TILE];
  switch (queries) {
    case 1: multiply_int4<1>(ready, dim, tile, ahead, products); break;
    case 2: multiply_int4<2>(ready, dim, tile, ahead, products); break;
    case 3: multiply_int4<3>(ready, dim, tile, ahead, products); break;
    default: multiply_int4<4>(ready, dim, tile, ahead, products);
  }
  float scale[TILE];
  key_scales(head, tile, scale);
  for (int q = 0; q < queries; ++q)
    for (int t = 0; t < TILE; ++t)
      planes[q * TILE + t] = float(products[q * TILE + t] - ready[q]->offset) * (scale[t] * ready[q]->scale);
}
