// Keys that are stored before their rotation, turned as they are read: an entry's place in the list is its position.

// The tile's keys in fp32, turned, in `rows`; the tile then points there.
template <class T>
static void turn_keys(const Attention& a, Tile& tile, float* rows) {
  const int64_t dim = a.slots.dim, half = a.rotary / 2;
  for (int t = 0; t < tile.count; ++t) {
    const T* from = static_cast<const T*>(tile.key[t]);
    const float* cosine = a.cosine + tile.entry[t] * a.table_row;
    const float* sine = a.sine + tile.entry[t] * a.table_row;
    float* to = rows + t * dim;
    int64_t d = 0;
    for (; d + LANES <= half; d += LANES) {
      const Vec x = load(from + d), y = load(from + half + d);
      store(to + d, x * load(cosine + d) - y * load(sine + d));
      store(to + half + d, y * load(cosine + half + d) + x * load(sine + half + d));
    }
    for (; d < half; ++d) {
      const float x = one(from + d), y = one(from + half + d);
      to[d] = x * cosine[d] - y * sine[d];
      to[half + d] = y * cosine[half + d] + x * sine[half + d];
    }
    for (d = a.rotary; d < dim; ++d) to[d] = one(from + d);
    tile.key[t] = to;
  }
  for (int t = tile.count; t < TILE + 8; ++t) tile.key[t] = tile.key[tile.count - 1];
}
