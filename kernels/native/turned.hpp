// Keys that are stored before their rotation, turned as they are read: an entry's place in the list is its position. The
// single query row, not rotated either, stands at the last place. Both halves of a row of the tables are alike: one is read.

template <class T>
static inline __attribute__((always_inline)) void turn_row(const Attention& a, int64_t place, const T* from, float* to) {
  const int64_t half = a.rotary / 2;
  const float* cosine = a.cosine + place * a.table_row;
  const float* sine = a.sine + place * a.table_row;
  int64_t d = 0;
  for (; d + LANES <= half; d += LANES) {
    const Vec x = load(from + d), y = load(from + half + d), c = load(cosine + d), s = load(sine + d);
    store(to + d, x * c - y * s);
    store(to + half + d, y * c + x * s);
  }
  for (; d < half; ++d) {
    const float x = one(from + d), y = one(from + half + d);
    to[d] = x * cosine[d] - y * sine[d];
    to[half + d] = y * cosine[d] + x * sine[d];
  }
  for (d = a.rotary; d < a.slots.dim; ++d) to[d] = one(from + d);
}

// The tile's keys in fp32, turned, in `rows`; the tile then points there. Meanwhile its values are asked for: scoring, which asks
// for them once more, is too short for all of them to come.
template <class T>
static void turn_keys(const Attention& a, Tile& tile, float* rows) {
  for (int t = 0; t < tile.count; ++t) {
    float* to = rows + t * a.slots.dim;
    const T* value = static_cast<const T*>(tile.value[t]);
    for (int64_t d = 0; d < a.slots.value_dim; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(value + d);
    turn_row(a, tile.entry[t], static_cast<const T*>(tile.key[t]), to);
    tile.key[t] = to;
  }
  for (int t = tile.count; t < TILE + 8; ++t) tile.key[t] = tile.key[tile.count - 1];
}

static void turn_queries(const Attention& a, int64_t entries, float* queries) {
  for (int64_t g = 0; g < a.query_heads / a.kv_heads; ++g) {
    float* query = queries + g * a.slots.dim;
    turn_row(a, entries - 1, query, query);
  }
}
