// Where slots lie among the rows near by, and which rows are given to slots that lie in none.
#include "places.hpp"

#include <algorithm>
#include <cstdlib>

namespace {

struct Rows {  // of one list
  int32_t *place, *holder, *used;

  void put(int64_t slot, int64_t row) const {
    if (holder[row] >= 0) place[holder[row]] = -1;
    holder[row] = int32_t(slot);
    place[slot] = int32_t(row);
  }

  void put_tail(int64_t base, int64_t tail) const {
    for (int64_t row = 0; row < tail; ++row) {
      const int64_t slot = base + row;
      if (holder[row] == slot) continue;
      if (place[slot] >= 0) holder[place[slot]] = -1;
      put(slot, row);
    }
  }
};

// The `count` least recently used rows behind the first `tail`, of equal ones the first, oldest first. `order` holds `rows` numbers.
void oldest_of(const FindPlaces& f, const int32_t* used, int64_t count, uint64_t* order) {
  const int64_t given = f.rows - f.tail;
  for (int64_t i = 0; i < given; ++i) order[i] = uint64_t(uint32_t(used[f.tail + i]) ^ 0x80000000u) << 32 | uint64_t(f.tail + i);
  if (count < given) std::nth_element(order, order + count, order + given);
  std::sort(order, order + count);
}

}  // namespace

int find_places(const FindPlaces& f) {
  int64_t largest = f.base + f.tail - 1;
  for (int64_t i = 0; i < f.lists * f.count; ++i) largest = f.index[i] > largest ? f.index[i] : largest;
  if (largest >= f.slots) return INDEX_OUT_OF_RANGE;
  uint64_t* order = static_cast<uint64_t*>(std::malloc(sizeof(uint64_t) * size_t(f.rows + 1)));
  if (!order) return OUT_OF_MEMORY;
  int64_t* missing = f.missing + 1;
  for (int64_t list = 0; list < f.lists; ++list) {
    const int64_t* index = f.index + list * f.count;
    int64_t* found = f.found + list * f.count;
    const Rows rows{f.place + list * f.slots, f.holder + list * f.rows, f.used + list * f.rows};
    rows.put_tail(f.base, f.tail);
    int64_t wanted = 0;
    for (int64_t e = 0; e < f.count; ++e) {
      found[e] = index[e] < 0 ? -1 : rows.place[index[e]];
      if (found[e] >= 0) rows.used[found[e]] = int32_t(f.now);
      wanted += index[e] >= 0 && found[e] < 0;
    }
    if (wanted == 0) continue;
    oldest_of(f, rows.used, wanted, order);
    const uint64_t* next = order;
    for (int64_t e = 0; e < f.count; ++e) {
      if (index[e] < 0 || found[e] >= 0) continue;
      if (rows.place[index[e]] < 0) {  // else it is listed twice
        const int64_t row = int64_t(*next++ & 0xffffffffu);
        rows.put(index[e], row);
        rows.used[row] = int32_t(f.now);
        *missing++ = list * f.count + e;
      }
      found[e] = rows.place[index[e]];
    }
  }
  *f.missing = missing - f.missing - 1;
  std::free(order);
  return OK;
}
