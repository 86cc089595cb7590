// Rows of int8, each followed by its fp32 scale: a row's largest magnitude is 127 of it.
// Included inside the namespace of one instruction set.

static int pack_int8(const Packing& p) {
  const int64_t rows = p.batch * p.heads * p.slots, width = p.dim + int64_t(sizeof(float));
#pragma omp parallel for schedule(static) num_threads(int(p.threads)) if (p.threads > 1 && rows * width > SMALL_WORK)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t slot = row % p.slots, h = row / p.slots % p.heads, b = row / p.slots / p.heads;
    float wide[MAX_DIM];
    read_row(p.source, p.kind, b * p.batch_stride + h * p.head_stride + slot * p.slot_stride, wide, p.dim, 1.f);
    float largest = 0;
    for (int64_t d = 0; d < p.dim; ++d) {
      const float magnitude = wide[d] < 0 ? -wide[d] : wide[d];
      if (magnitude > largest || magnitude != magnitude) largest = magnitude;  // what is no number stays none
    }
    const float scale = largest / 127;
    const float divisor = scale < 1.17549435e-38f ? 1.17549435e-38f : scale;
    int8_t* out = p.output + row * width;
    for (int64_t d = 0; d < p.dim; ++d) out[d] = int8_t(int32_t(__builtin_rintf(wide[d] / divisor)));
    std::memcpy(out + p.dim, &scale, sizeof scale);
  }
  return OK;
}
