// Where slots lie among the rows near by, which rows are given to slots that lie in none, and where these are read from.
#include "places.hpp"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

namespace {

constexpr int32_t COMING = -2;  // in no row yet, and counted
constexpr int32_t USE = 1 << 24, LARGEST = 8 * USE;  // what a use adds, and what nothing ever exceeds
constexpr int32_t NOW = 1 << 30;                     // a mark above that

struct Rows {  // of one list
  int32_t *place, *holder, *uses;

  bool has(int64_t slot, int64_t row, int64_t count) const {
    return slot >= 0 && row >= 0 && row < count && holder[row] == slot;
  }

  void empty(int64_t row) const {
    if (holder[row] >= 0) place[holder[row]] = -1;
    holder[row] = -1;
  }

  void put(int64_t slot, int64_t row) const {
    empty(row);
    holder[row] = int32_t(slot);
    place[slot] = int32_t(row);
  }

  void put_tail(int64_t base, int64_t tail, int64_t vacant) const {
    for (int64_t row = 0; row < tail; ++row) {
      const int64_t slot = base + row;
      if (holder[row] == slot) continue;
      if (place[slot] >= 0) holder[place[slot]] = -1;
      put(slot, row);
    }
    for (int64_t row = tail; row < tail + vacant; ++row) empty(row);
  }

  // One turn later. Those of `found` are marked by NOW: they are not given away, and the caller takes the mark back.
  void age(const int64_t* found, int64_t count, int64_t rows) const {
    for (int64_t row = 0; row < rows; ++row) uses[row] -= uses[row] >> 3;
    for (int64_t e = 0; e < count; ++e)
      if (found[e] >= 0 && uses[found[e]] < NOW) uses[found[e]] += USE + NOW;
  }
};

// The largest of the `count` least of `keys`, which lie between -1 and what is marked by NOW. There is room for all of them in `some`.
int32_t largest_of_least(const int32_t* keys, int64_t size, int64_t count, int32_t* some) {
  constexpr int COARSE = 17, PARTS = (LARGEST >> COARSE) + 3;  // the marked ones are in the last part, those of nothing in the first
  int64_t held[PARTS] = {};
  const auto part_of = [](int32_t key) { return key < 0 ? 0 : std::min((key >> COARSE) + 1, PARTS - 1); };
  for (int64_t i = 0; i < size; ++i) ++held[part_of(keys[i])];
  int part = 0;
  for (; count > held[part]; ++part) count -= held[part];
  int32_t* end = some;
  for (int64_t i = 0; i < size; ++i) {
    *end = keys[i];
    end += part_of(keys[i]) == part;
  }
  std::nth_element(some, some + count - 1, end);
  return some[count - 1];
}

// The `count` rows behind those of the tail that were used least, of equal ones the first, in order; empty ones before all others. There
// is room for all of them.
void least_used(const FindPlaces& f, const Rows& rows, int64_t count, int32_t* keys, int32_t* given) {
  const int64_t first = f.tail + f.vacant, size = f.rows - first;
  for (int64_t i = 0; i < size; ++i) keys[i] = rows.holder[first + i] < 0 ? -1 : rows.uses[first + i];
  int32_t most = largest_of_least(keys, size, count, given);
  int64_t equal = count;
  for (int64_t i = 0; i < size; ++i) equal -= keys[i] < most;
  for (int64_t i = 0; i < size; ++i) {  // without branches, which nobody could foresee
    *given = int32_t(first + i);
    const bool as_large = keys[i] == most;
    given += (keys[i] < most) | (as_large & (equal > 0));
    equal -= as_large;
  }
}

}  // namespace

int find_places(const FindPlaces& f) {
  int64_t largest = f.base + f.tail - 1;
  for (int64_t i = 0; i < f.lists * f.count; ++i) largest = f.index[i] > largest ? f.index[i] : largest;
  if (largest >= f.slots) return INDEX_OUT_OF_RANGE;
  int32_t* keys = static_cast<int32_t*>(std::malloc(sizeof(int32_t) * size_t(2 * f.rows + 1)));
  if (!keys) return OUT_OF_MEMORY;
  int64_t* missing = f.missing + 1;
  for (int64_t list = 0; list < f.lists; ++list) {
    const int64_t* index = f.index + list * f.count;
    int64_t* found = f.found + list * f.count;
    const Rows rows{f.place + list * f.slots, f.holder + list * f.rows, f.uses + list * f.rows};
    rows.put_tail(f.base, f.tail, f.vacant);
    int64_t wanted = 0;
    for (int64_t e = 0; e < f.count; ++e) {
      if (rows.has(index[e], found[e], f.rows)) continue;  // what rows hold is near by, the long table of places is not
      found[e] = index[e] < 0 ? -1 : rows.place[index[e]];
      if (index[e] < 0 || found[e] != -1) continue;
      rows.place[index[e]] = COMING;
      ++wanted;
    }
    if (wanted == 0) continue;
    int32_t* given = keys + f.rows;
    rows.age(found, f.count, f.rows);
    least_used(f, rows, wanted, keys, given);
    for (int64_t e = 0; e < f.count; ++e) {
      if (index[e] < 0 || found[e] >= 0) continue;
      if (rows.place[index[e]] < 0) {  // else it is listed twice
        rows.put(index[e], *given);
        rows.uses[*given++] = USE + NOW;
        *missing++ = list * f.count + e;
      }
      found[e] = rows.place[index[e]];
    }
    for (int64_t row = 0; row < f.rows; ++row) rows.uses[row] &= NOW - 1;
  }
  *f.missing = missing - f.missing - 1;
  std::free(keys);
  return OK;
}

namespace {

constexpr int NUMBER = 32;  // bits of a row's number in its block

struct Row {
  int64_t key, target;  // its block and, in the lower bits, its number there; its place
  bool operator<(const Row& other) const { return key < other.key; }
};

// Rows in the order of `entries`, and whether they ascend.
bool list_rows(const RowsToRead& r, Row* rows) {
  bool ascend = true;
  for (int64_t i = 0; i < r.missing; ++i) {
    const int64_t entry = r.entries[i], list = r.lists == 1 ? 0 : entry / r.count, slot = r.index[entry];
    const int64_t block = slot / r.block, row = list / r.groups, group = list - row * r.groups;
    const int64_t then = r.then ? r.then[block * (r.lists / r.groups) + row] : row;
    const int64_t number = (then * r.groups + group) * r.block + slot - block * r.block;
    rows[i] = {block << NUMBER | number, list * r.rows + r.places[entry]};
    ascend = ascend && (i == 0 || rows[i - 1] < rows[i]);
  }
  return ascend;
}

}  // namespace

int rows_to_read(const RowsToRead& r) {
  for (int64_t i = 0; i < r.missing; ++i) {
    if (r.entries[i] < 0 || r.entries[i] >= r.lists * r.count) return INDEX_OUT_OF_RANGE;
    const int64_t slot = r.index[r.entries[i]];
    if (slot < 0 || slot / r.block >= r.blocks) return INDEX_OUT_OF_RANGE;
  }
  std::unique_ptr<Row[]> rows(new (std::nothrow) Row[size_t(r.missing)]);
  if (!rows) return OUT_OF_MEMORY;
  if (!list_rows(r, rows.get())) std::sort(rows.get(), rows.get() + r.missing);
  int64_t *blocks = r.found + 1, count = 0;
  for (int64_t i = 0; i < r.missing; ++i) {
    const int64_t block = rows[i].key >> NUMBER;
    if (count == 0 || block != blocks[count - 1]) {
      r.firsts[count] = i;
      blocks[count++] = block;
    }
    r.numbers[i] = rows[i].key & ((int64_t(1) << NUMBER) - 1);
    r.targets[i] = rows[i].target;
  }
  r.firsts[count] = r.missing;
  *r.found = count;
  return OK;
}
