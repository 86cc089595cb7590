// Scores of slots whose rows are codes, by queries that were rounded: `round_query` and `multiply_words` of each kind are in its own file.
// Included inside the namespace of one instruction set.

template <bool VNNI>
static const Int4Query* rounded_query(Int4<VNNI>, const float* row) { return reinterpret_cast<const Int4Query*>(row); }
#if LANES >= 8
template <bool VNNI>
static const Int8Query* rounded_query(Int8<VNNI>, const float* row) { return reinterpret_cast<const Int8Query*>(row); }
#endif

// planes[query][slot] of up to four queries [query][dim], which are rounded, by the rows' factors `scale`, a multiple of LANES of them.
template <class T, class Rows>
static inline __attribute__((always_inline)) void score_rows(const float* query, int queries, int64_t dim, const Rows& rows, int count,
                                                             const float* scale, float* planes) {
  decltype(rounded_query(T(), query)) ready[4];
  for (int q = 0; q < queries; ++q) ready[q] = rounded_query(T(), query + q * dim);
  switch (queries) {
    case 1: return multiply_words<1>(T(), ready, dim, rows, count, scale, planes);
    case 2: return multiply_words<2>(T(), ready, dim, rows, count, scale, planes);
    case 3: return multiply_words<3>(T(), ready, dim, rows, count, scale, planes);
    default: multiply_words<4>(T(), ready, dim, rows, count, scale, planes);
  }
}

// As score_planes of other kinds.
template <class T>
static std::enable_if_t<IS_ROUNDED<T>> score_planes(const Head<T>& head, const float* query, int queries, const Tile& tile,
                                                    const void* const* ahead, float* planes) {
  float scale[TILE];
  key_scales(head, tile, scale);
  score_rows<T>(query, queries, head.slots.dim, ListedRows{tile.key, ahead}, tile.count, scale, planes);
}

// As score_planes, of the TILE slots from `first` on: their rows are found without a list.
template <class T>
static void score_run(const Head<T>& head, const float* query, int queries, int64_t first, float* planes) {
  constexpr int CHANNELS = T::CHANNELS;
  const Slots& s = head.slots;
  const float* from = head.key_scale + first * s.key_scale_slot;
  float apart[TILE];
  if (s.key_scale_slot != 1)
    for (int t = 0; t < TILE; ++t) apart[t] = from[t * s.key_scale_slot];
  const float* scale = s.key_scale_slot == 1 ? from : apart;
  const char* keys = reinterpret_cast<const char*>(head.keys + first * s.key_slot);
  const bool beside = s.key_slot * CHANNELS == s.dim;  // no row lies apart from the next
  if (beside && s.dim == 64) return score_rows<T>(query, queries, 64, RunRows<64 / CHANNELS>{keys, 0}, TILE, scale, planes);
  if (beside && s.dim == 128) return score_rows<T>(query, queries, 128, RunRows<128 / CHANNELS>{keys, 0}, TILE, scale, planes);
  score_rows<T>(query, queries, s.dim, RunRows<0>{keys, s.key_slot}, TILE, scale, planes);
}
