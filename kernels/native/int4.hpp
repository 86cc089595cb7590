// Rows of int4: two codes a byte, each plus 8, the even channel in the low half. Before it is rounded, a row is turned by a
// Walsh-Hadamard matrix, so that no channel stands out; queries are turned alike and rounded to int8, so that products are integers.

struct Int4Query {  // lies where its fp32 row lay, which is no shorter
  float scale;
  int32_t offset;  // what the products hold too much, as codes are stored plus 8
  const int8_t* codes() const { return reinterpret_cast<const int8_t*>(this + 1); }  // of even channels, then of odd ones
};

// Make of a query row in fp32 an Int4Query.
template <bool VNNI>
static inline void round_query(Int4<VNNI>, float* row, int64_t dim) {
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

#if LANES >= 8
// The products of COUNT words of the first LANES rows are added to sums[query][row]. So many fit in 16 bits: 15 * 127 * 2 * 8 < 2^15.
template <bool VNNI, int QUERIES, int COUNT, class Rows>
static inline void add_int4(const Int4Query* const* query, int64_t half, const Rows& rows, int64_t byte, Words* sums) {
  Words word[4], products[QUERIES];
  words_of<COUNT>(rows, byte, word);
  rows.fetch(byte);
  const Words nibble = WORDS(set1_epi8)(15), one = WORDS(set1_epi16)(1);
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i) {
    const Words even = LOW_BITS(word[i], nibble), odd = LOW_BITS(WORDS(srli_epi16)(word[i], 4), nibble);
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q) {
      const int8_t* codes = query[q]->codes() + byte + 4 * i;
      const Words of_even = WORDS(set1_epi32)(word_at(codes)), of_odd = WORDS(set1_epi32)(word_at(codes + half));
      if (VNNI) {
        add_products(sums[q], even, of_even);
        add_products(sums[q], odd, of_odd);
        continue;
      }
      const Words both = WORDS(add_epi16)(WORDS(maddubs_epi16)(even, of_even), WORDS(maddubs_epi16)(odd, of_odd));
      products[q] = i ? WORDS(add_epi16)(products[q], both) : both;
    }
  }
  if (VNNI) return;
#pragma GCC unroll 4
  for (int q = 0; q < QUERIES; ++q) sums[q] = WORDS(add_epi32)(sums[q], WORDS(madd_epi16)(products[q], one));
}

template <int QUERIES, bool VNNI, class Rows>
static inline __attribute__((always_inline)) void multiply_words(Int4<VNNI>, const Int4Query* const* query, int64_t dim,
                                                                 const Rows& all, int count, const float* scale, float* planes) {
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
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q) {
      const Vec product = __builtin_convertvector(reinterpret_cast<VecInt>(sums[q]), Vec);
      store(planes + q * TILE + t, product * (load(scale + t) * splat(query[q]->scale)));
    }
  }
}
#else
template <int QUERIES, bool VNNI, class Rows>
static void multiply_words(Int4<VNNI>, const Int4Query* const* query, int64_t dim, const Rows& rows, int count, const float* scale,
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
