// Sums over the lanes of four vectors at once.

static inline void sum_four(const Vec* sums, float* out) {
#if LANES >= 8
  __m256 x[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#if LANES == 16
    const __m512 wide = reinterpret_cast<__m512>(sums[i]);
    x[i] = _mm256_add_ps(_mm512_castps512_ps256(wide), _mm512_extractf32x8_ps(wide, 1));
#else
    x[i] = reinterpret_cast<__m256>(sums[i]);
#endif
  }
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = sum_lanes(sums[i]);
#endif
}
