// Rows of int8 or int4, each followed by its fp32 scale. Included inside the namespace of one instruction set.

// Row by row: `write(wide, b, h, out)` rounds one and returns its scale, which comes behind its `bytes`.
template <class Write>
static int pack_rows(const Packing& p, int64_t bytes, const Write& write) {
  const int64_t rows = p.batch * p.heads * p.slots, width = bytes + int64_t(sizeof(float));
#pragma omp parallel for schedule(static) num_threads(int(p.threads)) if (p.threads > 1 && rows * width > SMALL_WORK)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t slot = row % p.slots, head = row / p.slots, h = head % p.heads, b = head / p.heads;
    float wide[MAX_DIM];
    read_row(p.source, p.kind, b * p.batch_stride + h * p.head_stride + slot * p.slot_stride, wide, p.dim, 1.f);
    int8_t* out = static_cast<int8_t*>(p.output) + row * width;
    const float scale = write(wide, head, out);
    std::memcpy(out + bytes, &scale, sizeof scale);
  }
  return OK;
}

static int pack_int8(const Packing& p) {
  return pack_rows(p, p.dim, [&](const float* wide, int64_t, int8_t* out) { return round_row(wide, p.dim, 127, out); });
}

static int pack_int4(const Packing& p) {
  return pack_rows(p, p.dim / 2, [&](float* wide, int64_t head, int8_t* out) {
    int8_t codes[MAX_DIM];
    if (p.centre)
      for (int64_t d = 0; d < p.dim; ++d) wide[d] -= p.centre[head * p.dim + d];
    mix_channels(wide, p.dim);
    const float scale = round_row(wide, p.dim, 7, codes);
    for (int64_t i = 0; i < p.dim / 2; ++i) out[i] = int8_t((codes[2 * i] + 8) | (codes[2 * i + 1] + 8) << 4);
    return scale / float(p.dim & -p.dim);
  });
}
