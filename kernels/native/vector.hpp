// Vectors of LANES fp32 numbers, the storage types read into them, and the functions of softmax.
// Included inside the namespace of one instruction set: LANES is 4 (any machine), 8 (AVX2) or 16 (AVX-512).

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t VecInt __attribute__((vector_size(LANES * 4)));
typedef uint32_t VecBits __attribute__((vector_size(LANES * 4)));
typedef float VecAny __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t VecBitsAny __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

#if LANES == 8
static inline Vec splat(float x) { return reinterpret_cast<Vec>(_mm256_set1_ps(x)); }
#elif LANES == 16
static inline Vec splat(float x) { return reinterpret_cast<Vec>(_mm512_set1_ps(x)); }
#else
static inline Vec splat(float x) { return Vec{x, x, x, x}; }
#endif
static inline Vec load(const float* p) { return *reinterpret_cast<const VecAny*>(p); }
static inline void store(float* p, Vec x) { *reinterpret_cast<VecAny*>(p) = x; }
static inline Vec as_float(VecInt x) { return reinterpret_cast<Vec>(x); }
static inline VecInt as_int(Vec x) { return reinterpret_cast<VecInt>(x); }
#if LANES == 8
static inline Vec larger(Vec a, Vec b) {  // b where one of them is NaN
  return reinterpret_cast<Vec>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
}
#elif LANES == 16
static inline Vec larger(Vec a, Vec b) {
  return reinterpret_cast<Vec>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
#else
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
#endif

#if LANES == 8
static inline bool any_above(Vec a, Vec b) {  // whether a > b in some lane
  return _mm256_movemask_ps(_mm256_cmp_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), _CMP_GT_OQ)) != 0;
}
#elif LANES == 16
static inline bool any_above(Vec a, Vec b) {
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GT_OQ) != 0;
}
#else
static inline bool any_above(Vec a, Vec b) {
  const VecInt above = a > b;
  return (above[0] | above[1] | above[2] | above[3]) != 0;
}
#endif

#if LANES == 8
static inline Vec by_sign(Vec sign, Vec negative, Vec other) {  // lane by lane, by the sign bit
  return reinterpret_cast<Vec>(
      _mm256_blendv_ps(reinterpret_cast<__m256>(other), reinterpret_cast<__m256>(negative), reinterpret_cast<__m256>(sign)));
}
#elif LANES == 16
static inline Vec by_sign(Vec sign, Vec negative, Vec other) {  // lane by lane, by the sign bit
  const __mmask16 below = _mm512_movepi32_mask(reinterpret_cast<__m512i>(sign));
  return reinterpret_cast<Vec>(_mm512_mask_blend_ps(below, reinterpret_cast<__m512>(other), reinterpret_cast<__m512>(negative)));
}
#else
static inline Vec by_sign(Vec sign, Vec negative, Vec other) { return as_int(sign) < 0 ? negative : other; }
#endif

#if defined(__x86_64__) && (LANES == 8 || LANES == 16)
#define KEEP_IN_REGISTER(x) asm("" : "+v"(x))  // or each use is folded into a load of its own, and loads are the limit
#else
#define KEEP_IN_REGISTER(x)
#endif

// ---- storage types -------------------------------------------------------------------------------------------------

static inline float one(const float* p) { return *p; }
static inline float one(const BFloat16* p) {
  const uint32_t bits = uint32_t(p->bits) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
static inline float one(const Float16* p) {
  uint32_t bits = uint32_t(p->bits & 0x7fff) << 13;
  float x;
  std::memcpy(&x, &bits, 4);
  x *= 5.192296858534828e33f;  // 2^112: from fp16's exponent bias to fp32's, subnormals included
  if ((p->bits & 0x7c00) == 0x7c00) {
    bits |= 0x7f800000;
    std::memcpy(&x, &bits, 4);
  }
  return (p->bits & 0x8000) ? -x : x;
}
static inline float one(const int8_t* p) { return float(*p); }

#if LANES == 8
static inline Vec load(const BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Vec>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
static inline Vec load(const Float16* p) {
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
static inline Vec load(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Vec>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
}
#elif LANES == 16
static inline Vec load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
static inline Vec load(const Float16* p) {
  return reinterpret_cast<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
static inline Vec load(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Vec>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
}
#else
template <class T>
static inline Vec load(const T* p) {
  Vec x;
  for (int i = 0; i < LANES; ++i) x[i] = one(p + i);
  return x;
}
#endif

static inline void put(float* p, float x) { *p = x; }
static inline void put(BFloat16* p, float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  p->bits = (x != x) ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline void put(Float16* p, float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;
  } else if (bits >= 0x477ff000) {  // rounds past the largest fp16
    half = 0x7c00;
  } else if (bits < 0x38800000) {  // subnormal in fp16: the adder of fp32 does the rounding
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&half, &magnitude, 4);
    half -= 0x3f000000;
  } else {
    half = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
  }
  p->bits = uint16_t(sign | half);
}

// The nearest number of a bound's type that is not above `x`, or not below it. Only bfloat16 holds bounds of wider keys.
template <class T>
static inline void put_bound(T* p, float x, bool) { put(p, x); }
static inline void put_bound(BFloat16* p, float x, bool below) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool away = (bits >> 31) == uint32_t(below) && (bits & 0xffff);
  p->bits = x != x ? 0x7fc0 : uint16_t((bits >> 16) + away);
}

// ---- reductions ----------------------------------------------------------------------------------------------------

static inline float sum_lanes(Vec x) {
#if LANES >= 8
#if LANES == 16
  const __m512 wide = reinterpret_cast<__m512>(x);
  __m256 y = _mm256_add_ps(_mm512_castps512_ps256(wide), _mm512_extractf32x8_ps(wide, 1));
#else
  __m256 y = reinterpret_cast<__m256>(x);
#endif
  __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_add_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_shuffle_ps(z, z, 1)));
#else
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += x[i];
  return total;
#endif
}
static inline float max_lanes(Vec x) {
#if LANES >= 8
#if LANES == 16
  const __m512 wide = reinterpret_cast<__m512>(x);
  __m256 y = _mm256_max_ps(_mm512_castps512_ps256(wide), _mm512_extractf32x8_ps(wide, 1));
#else
  __m256 y = reinterpret_cast<__m256>(x);
#endif
  __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_max_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_shuffle_ps(z, z, 1)));
#else
  float best = x[0];
  for (int i = 1; i < LANES; ++i) best = x[i] > best ? x[i] : best;
  return best;
#endif
}

// ---- functions -----------------------------------------------------------------------------------------------------

// e^x for x <= 88 to about one unit in the last place; 0 below -87.3 (no subnormal results); NaN stays.
static inline Vec exp_vec(Vec x) {
  const Vec lowest = splat(-87.3f);
  const Vec clamped = larger(lowest, x);  // the operand order keeps a NaN
  const Vec shifted = clamped * splat(1.44269504088896341f) + splat(12582912.f);  // 1.5 * 2^23 rounds to integer
  const Vec n = shifted - splat(12582912.f);
  Vec r = clamped - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  Vec y = splat(1.9875691500e-4f);  // Cephes expf
  y = y * r + splat(1.3981999507e-3f);
  y = y * r + splat(8.3334519073e-3f);
  y = y * r + splat(4.1665795894e-2f);
  y = y * r + splat(1.6666665459e-1f);
  y = y * r + splat(5.0000001201e-1f);
  y = y * (r * r) + r + splat(1.f);
  y = y * as_float((as_int(shifted) - (0x4b400000 - 127)) << 23);
  return x < lowest ? Vec{} : y;
}

#define EACH(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < (count); ++i)

// log of positive normal numbers (Cephes logf), in place; several go side by side, for each is a long chain of steps.
template <int COUNT>
static inline __attribute__((always_inline)) void log_each(Vec (&x)[COUNT]) {
  static const float TERMS[] = {-1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f, 1.4249322787e-1f,
                                -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
  VecInt exponent[COUNT];
  Vec e[COUNT], m[COUNT], z[COUNT], y[COUNT];
  EACH(i, COUNT) exponent[i] = (as_int(x[i]) - 0x3f3504f3) >> 23;
  EACH(i, COUNT) e[i] = __builtin_convertvector(exponent[i], Vec);
  EACH(i, COUNT) m[i] = as_float(as_int(x[i]) - (exponent[i] << 23)) - splat(1.f);  // sqrt(1/2) to sqrt(2), less 1
  EACH(i, COUNT) z[i] = m[i] * m[i];
  EACH(i, COUNT) y[i] = splat(7.0376836292e-2f);
  EACH(term, 8) EACH(i, COUNT) y[i] = y[i] * m[i] + splat(TERMS[term]);
  EACH(i, COUNT) y[i] = y[i] * m[i] * z[i];
  EACH(i, COUNT) y[i] = y[i] + e[i] * splat(-2.12194440e-4f) - splat(0.5f) * z[i];
  EACH(i, COUNT) x[i] = m[i] + y[i] + e[i] * splat(0.693359375f);
}

static inline Vec tanh_vec(Vec x) {
  const Vec a = as_float(as_int(x) & 0x7fffffff);
  const Vec z = x * x;
  Vec y = splat(-5.70498872745e-3f);  // Cephes tanhf for |x| < 0.625
  y = y * z + splat(2.06390887954e-2f);
  y = y * z + splat(-5.37397155531e-2f);
  y = y * z + splat(1.33314422036e-1f);
  y = y * z + splat(-3.33332819422e-1f);
  const Vec small = y * z * x + x;
  const Vec big = splat(1.f) - splat(2.f) / (exp_vec(a < splat(22.f) ? a + a : splat(44.f)) + splat(1.f));
  const Vec signed_big = as_float((as_int(x) & VecInt(as_int(splat(-0.f)))) | as_int(big));
  return x != x ? x : (a < splat(0.625f) ? small : signed_big);
}
