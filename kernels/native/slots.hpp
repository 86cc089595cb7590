// Walking the slots of one (batch row, KV head): which there are, where their rows lie, and which a query may see.
// Included inside the namespace of one instruction set.

constexpr int TILE = 64;  // slots worked on at a time

struct Tile {
  int count;
  int64_t newest, oldest;        // positions
  const void* key[TILE + 8];     // padded with repeats of the last, so that kernels may read in twos and fours
  const void* value[TILE + 8];
  int64_t position[TILE + 8];
  int64_t entry[TILE + 8];       // place in the head's entries
};

struct Positions {  // of one head, in either integer type
  const int32_t* narrow;
  const int64_t* wide;
  Positions(const void* base, int64_t bytes, int64_t offset)
      : narrow(base && bytes == 4 ? static_cast<const int32_t*>(base) + offset : nullptr),
        wide(base && bytes == 8 ? static_cast<const int64_t*>(base) + offset : nullptr) {}
  explicit operator bool() const { return narrow || wide; }
  int64_t operator[](int64_t slot) const { return narrow ? narrow[slot] : wide[slot]; }
};

template <class T>
struct Head {  // the entries of one (batch row, KV head)
  const Slots& slots;
  const T* keys;
  const T* values;
  const float* key_scale;
  const float* value_scale;
  Positions positions;
  const int64_t* index;
  int64_t length, entries;

  Head(const Slots& s, int64_t kv_heads, int64_t b, int64_t h)
      : slots(s), positions(s.positions, s.position_bytes, b * s.position_batch + h * s.position_head) {
    const bool flat = s.starts != nullptr;
    const int64_t start = flat ? s.starts[b * kv_heads + h] : 0;
    length = flat ? s.lengths[b * kv_heads + h] : s.slots;
    keys = static_cast<const T*>(s.keys) + (flat ? start * s.key_slot : b * s.key_batch + h * s.key_head);
    values = static_cast<const T*>(s.values) + (flat ? start * s.value_slot : b * s.value_batch + h * s.value_head);
    key_scale = s.key_scale;
    if (key_scale) key_scale += flat ? start * s.key_scale_slot : b * s.key_scale_batch + h * s.key_scale_head;
    value_scale = s.value_scale;
    if (value_scale) value_scale += flat ? start * s.value_scale_slot : b * s.value_scale_batch + h * s.value_scale_head;
    index = s.index ? s.index + b * s.index_batch + h * s.index_head : nullptr;
    entries = index ? s.index_count : length;
  }

  // The scale of slot `t` of a tile. It lies behind its row: whoever reads the row first need not wait for it.
  float key_scale_of(const Tile& tile, int t) const { return key_scale[slot_of(tile, t) * slots.key_scale_slot]; }
  float value_scale_of(const Tile& tile, int t) const { return value_scale[slot_of(tile, t) * slots.value_scale_slot]; }
  int64_t slot_of(const Tile& tile, int t) const { return index ? index[tile.entry[t]] : tile.entry[t]; }

  // Collect into `tile` the next slots from `entry` on (below `end`) that hold a token no newer than `limit`; return
  // the entry to go on from. Without positions a slot's position is its number.
  int64_t collect(Tile& tile, int64_t entry, int64_t end, int64_t limit) const {
    int n = 0;
    int64_t newest = INT64_MIN, oldest = INT64_MAX;
    if (!index && !positions) {
      if (limit < end) end = limit + 1 > entry ? limit + 1 : entry;
      n = int(end - entry < TILE ? end - entry : TILE);
      for (int i = 0; i < n; ++i) {
        tile.key[i] = keys + (entry + i) * slots.key_slot;
        tile.value[i] = values + (entry + i) * slots.value_slot;
        tile.entry[i] = tile.position[i] = entry + i;
      }
      oldest = entry;
      newest = entry + n - 1;
      entry += n;
    } else {
      for (; entry < end && n < TILE; ++entry) {
        const int64_t slot = index ? index[entry] : entry;
        if (slot < 0 || slot >= length) continue;
        const int64_t position = positions ? positions[slot] : slot;
        if (position < 0 || position > limit) continue;
        if (position > newest) newest = position;
        if (position < oldest) oldest = position;
        tile.key[n] = keys + slot * slots.key_slot;
        tile.value[n] = values + slot * slots.value_slot;
        tile.position[n] = position;
        tile.entry[n] = entry;
        ++n;
      }
    }
    tile.count = n;
    tile.newest = newest;
    tile.oldest = oldest;
    if (n)
      for (int i = n; i < TILE + 8; ++i) {
        tile.key[i] = tile.key[n - 1];
        tile.value[i] = tile.value[n - 1];
        tile.position[i] = INT64_MAX;
      }
    return entry;
  }
};

// Nothing outside the given memory may be read: the only numbers that could lead there are checked.
static int check_slots(const Slots& s, int64_t batch, int64_t kv_heads) {
  int64_t longest = s.slots;
  if (s.starts) {
    longest = 0;
    for (int64_t i = 0; i < batch * kv_heads; ++i) {
      if (s.starts[i] < 0 || s.lengths[i] < 0 || s.starts[i] + s.lengths[i] > s.flat_rows) return FLAT_OUT_OF_RANGE;
      if (s.positions && s.lengths[i] > s.slots) return FLAT_OUT_OF_RANGE;
      if (s.lengths[i] > longest) longest = s.lengths[i];
    }
  }
  if (s.index)
    for (int64_t b = 0; b < (s.index_batch ? batch : 1); ++b)
      for (int64_t h = 0; h < (s.index_head ? kv_heads : 1); ++h) {
        const int64_t* index = s.index + b * s.index_batch + h * s.index_head;
        int64_t most = -1;
        for (int64_t i = 0; i < s.index_count; ++i) most = index[i] > most ? index[i] : most;
        if (most >= longest) return INDEX_OUT_OF_RANGE;
      }
  return OK;
}
