// Where the near copies of slots lie, and which copies give way to slots that have none.
#include "places.hpp"

#include <algorithm>
#include <cstdlib>

namespace {

// The places of the `count` least recently used copies, of equal ones the first, oldest first. `order` holds `capacity` numbers.
void oldest_of(const int32_t* used, int64_t capacity, int64_t count, uint64_t* order) {
  for (int64_t p = 0; p < capacity; ++p) order[p] = uint64_t(uint32_t(used[p]) ^ 0x80000000u) << 32 | uint64_t(p);
  if (count < capacity) std::nth_element(order, order + count, order + capacity);
  std::sort(order, order + count);
}

}  // namespace

int find_places(const FindPlaces& f) {
  int64_t largest = -1;
  for (int64_t i = 0; i < f.lists * f.count; ++i) largest = f.index[i] > largest ? f.index[i] : largest;
  if (largest >= f.slots) return INDEX_OUT_OF_RANGE;
  uint64_t* order = static_cast<uint64_t*>(std::malloc(sizeof(uint64_t) * size_t(f.capacity + 1)));
  if (!order) return OUT_OF_MEMORY;
  int64_t* missing = f.missing + 1;
  for (int64_t list = 0; list < f.lists; ++list) {
    const int64_t* index = f.index + list * f.count;
    int64_t* found = f.found + list * f.count;
    int32_t *place = f.place + list * f.slots, *holder = f.holder + list * f.capacity, *used = f.used + list * f.capacity;
    int64_t wanted = 0;
    for (int64_t e = 0; e < f.count; ++e) {
      found[e] = index[e] < 0 ? -1 : place[index[e]];
      if (found[e] >= 0) used[found[e]] = int32_t(f.now);
      wanted += index[e] >= 0 && found[e] < 0;
    }
    if (wanted == 0) continue;
    oldest_of(used, f.capacity, wanted, order);
    const uint64_t* next = order;
    for (int64_t e = 0; e < f.count; ++e) {
      if (index[e] < 0 || found[e] >= 0) continue;
      if (place[index[e]] < 0) {  // else it is listed twice
        const int32_t given = int32_t(*next++ & 0xffffffffu);
        if (holder[given] >= 0) place[holder[given]] = -1;
        holder[given] = int32_t(index[e]);
        used[given] = int32_t(f.now);
        place[index[e]] = given;
        *missing++ = list * f.count + e;
      }
      found[e] = place[index[e]];
    }
  }
  *f.missing = missing - f.missing - 1;
  std::free(order);
  return OK;
}
