// Small things that every operation uses. Included inside the namespace of one instruction set.

constexpr int64_t MAX_DIM = 512;           // of a head; Python refuses more
constexpr int64_t SMALL_WORK = 128 << 10;  // bytes below which starting a second thread costs more than it saves
constexpr int64_t LARGE_WORK = 8 << 20;    // bytes above which finer pieces pay for themselves by balance

template <class T>
struct Buffer {  // uninitialised scratch; `data` is null when there is no memory
  T* data;
  explicit Buffer(int64_t count) : data(static_cast<T*>(std::malloc(sizeof(T) * size_t(count > 0 ? count : 1)))) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

static inline void fill(float* p, int64_t count, float x) {
  for (int64_t i = 0; i < count; ++i) p[i] = x;
}

template <class T>
static inline void widen_row(const T* from, float* to, int64_t dim, float factor) {
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) store(to + d, load(from + d) * splat(factor));
  for (; d < dim; ++d) to[d] = one(from + d) * factor;
}

static inline void read_row(const void* base, int64_t kind, int64_t offset, float* to, int64_t dim, float factor) {
  switch (kind) {
    case BF16: return widen_row(static_cast<const BFloat16*>(base) + offset, to, dim, factor);
    case FP16: return widen_row(static_cast<const Float16*>(base) + offset, to, dim, factor);
    default: return widen_row(static_cast<const float*>(base) + offset, to, dim, factor);
  }
}

static inline void put_row(void* base, int64_t kind, int64_t offset, const float* from, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) {
    if (kind == BF16) put(static_cast<BFloat16*>(base) + offset + d, from[d]);
    else if (kind == FP16) put(static_cast<Float16*>(base) + offset + d, from[d]);
    else put(static_cast<float*>(base) + offset + d, from[d]);
  }
}

constexpr int SCORED = LANES == 16 ? 4 : 2;  // slots scored at a time: what fits into registers, by four queries

// out[slot][0..3]: the sums over lanes of sum[slot][query]; what lies past QUERIES is 0.
template <int QUERIES>
static inline void sum_slots(const Vec (*sum)[QUERIES], float* out) {
#if LANES == 16
  __m512 by_slot[4];  // of each query: four partial sums of each slot
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    if (q >= QUERIES) {
      by_slot[q] = _mm512_setzero_ps();
      continue;
    }
    const __m512 a = reinterpret_cast<__m512>(sum[0][q]), b = reinterpret_cast<__m512>(sum[1][q]);
    const __m512 c = reinterpret_cast<__m512>(sum[2][q]), d = reinterpret_cast<__m512>(sum[3][q]);
    const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    by_slot[q] = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
  }
  const __m512 left = _mm512_add_ps(_mm512_unpacklo_ps(by_slot[0], by_slot[1]), _mm512_unpackhi_ps(by_slot[0], by_slot[1]));
  const __m512 right = _mm512_add_ps(_mm512_unpacklo_ps(by_slot[2], by_slot[3]), _mm512_unpackhi_ps(by_slot[2], by_slot[3]));
  _mm512_storeu_ps(out, _mm512_add_ps(_mm512_shuffle_ps(left, right, 0x44), _mm512_shuffle_ps(left, right, 0xee)));
#elif LANES == 8
  __m256 x[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) x[i] = i % 4 < QUERIES ? reinterpret_cast<__m256>(sum[i / 4][i % 4]) : _mm256_setzero_ps();
  const __m256 first = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  const __m256 second = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
  const __m256 left = _mm256_permute2f128_ps(first, second, 0x20), right = _mm256_permute2f128_ps(first, second, 0x31);
  _mm256_storeu_ps(out, _mm256_add_ps(left, right));
#else
  for (int slot = 0; slot < SCORED; ++slot)
    for (int q = 0; q < 4; ++q) out[slot * 4 + q] = q < QUERIES ? sum_lanes(sum[slot][q]) : 0.f;
#endif
}

// Queries of KV head `h`, rows `first … first + count - 1`, scaled: [group][count][dim] in fp32.
static inline void load_queries(const Attention& a, int64_t b, int64_t h, int64_t first, int64_t count, float* to) {
  const int64_t group = a.query_heads / a.kv_heads, dim = a.slots.dim;
  for (int64_t g = 0; g < group; ++g)
    for (int64_t r = 0; r < count; ++r) {
      const int64_t offset = b * a.query_batch + (h * group + g) * a.query_head + (first + r) * a.query_row;
      read_row(a.query, a.query_kind, offset, to + (g * count + r) * dim, dim, float(a.scaling));
    }
}
