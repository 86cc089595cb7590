// Rotary position embedding with the pairing of channel d with d + rotary / 2 (rotate-half); channels past `rotary` stay.

template <class T>
static int rotate_kind(const Rotation& p) {
  const int64_t half = p.rotary / 2;
  const float sign = float(p.sign);
  int wrong = 0;
#pragma omp parallel for schedule(static) num_threads(int(p.threads)) if (p.threads > 1 && p.slots > 256) reduction(| : wrong)
  for (int64_t task = 0; task < p.batch * p.heads * p.slots; ++task) {
    const int64_t slot = task % p.slots, h = task / p.slots % p.heads, b = task / p.slots / p.heads;
    const T* from = static_cast<const T*>(p.source) + b * p.batch_stride + h * p.head_stride + slot * p.slot_stride;
    T* to = static_cast<T*>(p.output) + b * p.output_batch + h * p.output_head + slot * p.output_slot;
    int64_t table = b * p.table_batch + h * p.table_head + slot * p.table_slot;
    if (p.positions) {
      const int64_t position = p.positions[b * p.position_batch + h * p.position_head + slot];
      if (position >= p.table_rows) {
        wrong |= 1;
        continue;
      }
      if (position < 0) {  // an empty slot has nothing to turn
        std::memcpy(to, from, size_t(p.dim) * sizeof(T));
        continue;
      }
      table = position * p.table_slot;
    }
    const float* cosine = p.cosine + table;
    const float* sine = p.sine + table;
    float row[MAX_DIM], out[MAX_DIM];
    widen_row(from, row, p.dim, 1.f);
    for (int64_t d = 0; d < half; ++d) {
      out[d] = row[d] * cosine[d] - row[d + half] * (sine[d] * sign);
      out[d + half] = row[d + half] * cosine[d + half] + row[d] * (sine[d + half] * sign);
    }
    for (int64_t d = p.rotary; d < p.dim; ++d) out[d] = row[d];
    for (int64_t d = 0; d < p.dim; ++d) put(to + d, out[d]);
  }
  return wrong ? INDEX_OUT_OF_RANGE : OK;
}

static int rotate(const Rotation& p) {
  switch (p.kind) {
    case BF16: return rotate_kind<BFloat16>(p);
    case FP16: return rotate_kind<Float16>(p);
    default: return rotate_kind<float>(p);
  }
}
