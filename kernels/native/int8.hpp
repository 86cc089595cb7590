// Rows of int8 where the machine adds products of bytes in one instruction. Each channel of a query is a whole number of steps, of DIGITS
// digits to the base of 256: it is off by 2^-24 of the largest channel, to which fp32 rounds that one too, and products are exact.
// Included inside the namespace of one instruction set.

#if LANES >= 8
constexpr int DIGITS = 3;
constexpr int64_t LEAST_INT8 = 16;  // channels: an Int8Query of fewer is longer than its fp32 row

struct Int8Query {  // lies where its fp32 row lay
  float scale;
  int32_t offset[DIGITS];  // what the products hold too much, as codes are read plus 128
  const int8_t* digits() const { return reinterpret_cast<const int8_t*>(this + 1); }  // the highest of all channels first
};

// Make of a query row in fp32 an Int8Query.
template <bool VNNI>
static inline void round_query(Int8<VNNI>, float* row, int64_t dim) {
  constexpr float LEVELS = 127 << 16;
  int8_t digits[DIGITS][MAX_DIM];
  int32_t whole[MAX_DIM];
  const float scale = round_row(row, dim, LEVELS, whole);
  Int8Query* to = reinterpret_cast<Int8Query*>(row);
  to->scale = scale;
  for (int i = DIGITS - 1; i >= 0; --i) {
    int32_t sum = 0;
    for (int64_t d = 0; d < dim; ++d) {
      digits[i][d] = int8_t(whole[d]);
      whole[d] = (whole[d] - digits[i][d]) >> 8;
      sum += digits[i][d];
    }
    to->offset[i] = 128 * sum;
    std::memcpy(reinterpret_cast<int8_t*>(to + 1) + i * dim, digits[i], size_t(dim));
  }
}

// The products of COUNT words of the first LANES rows are added to sums[query][digit][row].
template <int QUERIES, int COUNT, class Rows>
static inline __attribute__((always_inline)) void add_int8(const Int8Query* const* query, int64_t dim, const Rows& rows, int64_t byte,
                                                           Words (*sums)[DIGITS]) {
  const Words sign = WORDS(set1_epi8)(-128);
  Words word[4];
  words_of<COUNT>(rows, byte, word);
  rows.fetch(byte);
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i) {
    const Words biased = TOGGLED(word[i], sign);
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
      for (int digit = 0; digit < DIGITS; ++digit)
        add_products(sums[q][digit], biased, WORDS(set1_epi32)(word_at(query[q]->digits() + digit * dim + byte + 4 * i)));
  }
}

template <int QUERIES, bool VNNI, class Rows>
static inline __attribute__((always_inline)) void multiply_words(Int8<VNNI>, const Int8Query* const* query, int64_t dim,
                                                                 const Rows& all, int count, const float* scale, float* planes) {
  for (int t = 0; t < count; t += LANES) {
    const Rows rows = all.from(t);
    Words sums[QUERIES][DIGITS];
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
      for (int i = 0; i < DIGITS; ++i) sums[q][i] = WORDS(set1_epi32)(-query[q]->offset[i]);
    int64_t byte = 0;
#pragma GCC unroll 4
    for (; byte + 16 <= dim; byte += 16) add_int8<QUERIES, 4>(query, dim, rows, byte, sums);
    switch (dim - byte) {
      case 4: add_int8<QUERIES, 1>(query, dim, rows, byte, sums); break;
      case 8: add_int8<QUERIES, 2>(query, dim, rows, byte, sums); break;
      case 12: add_int8<QUERIES, 3>(query, dim, rows, byte, sums);
    }
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q) {
      Vec product = Vec{};
#pragma GCC unroll 4
      for (int i = 0; i < DIGITS; ++i)
        product = product * splat(256.f) + __builtin_convertvector(reinterpret_cast<VecInt>(sums[q][i]), Vec);
      store(planes + q * TILE + t, product * (load(scale + t) * splat(query[q]->scale)));
    }
  }
}
#endif
