// Rows of codes as words of four bytes, turned so that a lane is a row: products with a query's bytes then add up without a sum across
// lanes. Included inside the namespace of one instruction set.

#if LANES == 16
typedef __m512i Words;
#define WORDS(name) _mm512_##name
#define LOW_BITS(x, mask) _mm512_and_si512(x, mask)
#define TOGGLED(x, mask) _mm512_xor_si512(x, mask)
#elif LANES == 8
typedef __m256i Words;
#define WORDS(name) _mm256_##name
#define LOW_BITS(x, mask) _mm256_and_si256(x, mask)
#define TOGGLED(x, mask) _mm256_xor_si256(x, mask)
#endif

// Where rows lie: those that a tile lists, or rows side by side, BYTES apart or, where that is 0, `step`. Whoever works on the 16 bytes of
// LANES rows from `byte` on asks with `fetch` for a part of the rows that are needed next: for all of them at once would be too much.
struct ListedRows {
  const void* const* key;
  const void* const* ahead;
  ListedRows from(int t) const { return {key + t, ahead + t}; }
  const char* operator[](int t) const { return static_cast<const char*>(key[t]); }
  void fetch(int64_t byte) const {
    if (byte % 64 == 0)
      for (int i = 0; i < LANES; ++i) __builtin_prefetch(static_cast<const char*>(ahead[i]) + byte);
  }
};

template <int BYTES>
struct RunRows {
  const char* first;
  int64_t step;
  int64_t width() const { return BYTES ? BYTES : step; }
  RunRows from(int t) const {
    const char* row = first + t * width();
    asm("" : "+r"(row));  // or each of the rows behind it has a register of its own
    return {row, step};
  }
  const char* operator[](int t) const { return first + t * width(); }
  void fetch(int64_t byte) const {  // in the order of memory; behind the last row nothing is read: a hint does no harm
    const char* next = first + TILE * width() + LANES * byte;
    for (int i = 0; i < LANES * 16; i += 64) __builtin_prefetch(next + i);
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

// COUNT words of each of the first LANES rows from `byte` on: word[i], lane by lane.
template <int COUNT, class Rows>
static inline __attribute__((always_inline)) void words_of(const Rows& rows, int64_t byte, Words* word) {
  Words x[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) x[i] = rows_apart<COUNT>(rows, i, byte);
  const Words a = WORDS(unpacklo_epi32)(x[0], x[1]), b = WORDS(unpacklo_epi32)(x[2], x[3]);
  const Words c = WORDS(unpackhi_epi32)(x[0], x[1]), d = WORDS(unpackhi_epi32)(x[2], x[3]);
  word[0] = WORDS(unpacklo_epi64)(a, b);
  word[1] = WORDS(unpackhi_epi64)(a, b);
  word[2] = WORDS(unpacklo_epi64)(c, d);
  word[3] = WORDS(unpackhi_epi64)(c, d);
}

// Products of four bytes each with those of a query are added to `sums`.
#if LANES == 16 && !defined(__clang__)  // written out, as not all that this is compiled for have it
static inline void add_products(Words& sums, Words bytes, Words query) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "v"(query));
}
#else
static inline void add_products(Words&, Words, Words) {}  // no level in use has it
#endif
#endif
