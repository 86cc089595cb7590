// Rows before they are rounded to codes, and the rounding itself. Included inside the namespace of one instruction set.

template <class T>
constexpr bool IS_ROUNDED = false;  // whether queries are rounded before they meet rows of this kind, and products are integers
template <bool VNNI>
constexpr bool IS_ROUNDED<Int4<VNNI>> = true;
template <bool VNNI>
constexpr bool IS_ROUNDED<Int8<VNNI>> = true;

// Sums and differences at growing distance: `block` times an orthogonal matrix on each part of the greatest power of two that divides `dim`.
static inline void mix_channels(float* row, int64_t dim) {
  const int64_t block = dim & -dim;
  for (int64_t half = 1; half < block; half *= 2)
    for (int64_t first = 0; first < dim; first += 2 * half)
      for (int64_t d = first; d < first + half; ++d) {
        const float x = row[d], y = row[d + half];
        row[d] = x + y;
        row[d + half] = x - y;
      }
}

// `codes * scale` is at most half a scale away from every number, the largest magnitude is `levels` of it. Returns the scale.
template <class Code>
static inline float round_row(const float* wide, int64_t dim, float levels, Code* codes) {
  float largest = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const float magnitude = wide[d] < 0 ? -wide[d] : wide[d];
    if (magnitude > largest || magnitude != magnitude) largest = magnitude;  // what is no number stays none
  }
  const float scale = largest / levels;
  const float divisor = scale < 1.17549435e-38f ? 1.17549435e-38f : scale;
  for (int64_t d = 0; d < dim; ++d) codes[d] = Code(int32_t(__builtin_rintf(wide[d] / divisor)));
  return scale;
}
