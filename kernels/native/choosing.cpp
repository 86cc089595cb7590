// Which slots are attended to, once they have scores: the best of a row, whole pages, and a selection used once more.
// Nothing here is arithmetic that needs an instruction set.
#include "choosing.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>

namespace {

// A number whose order is that of the scores: both zeros are alike.
inline uint32_t rank_of(float score) {
  score += 0.f;
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000);  // negative ones: all bits, else the sign
}

struct Threshold {
  uint32_t rank;   // of the least score that is taken
  int64_t ties;    // how many of those with just this rank
};

// Radix selection: the `count`-th largest of the ranks `rank_at(0 … size - 1)`, BITS bits at a time, the highest first.
// `scratch` holds `size` ranks.
template <int BITS, class RankAt>
Threshold threshold_by(RankAt rank_at, int64_t size, int64_t count, uint32_t* scratch) {
  uint32_t bins[1 << BITS];
  std::memset(bins, 0, sizeof bins);
  int low = 32 - BITS;  // bits from here on are looked at
  for (int64_t i = 0; i < size; ++i) ++bins[rank_at(i) >> low];
  uint32_t prefix = 0, bin = (1u << BITS) - 1;
  int64_t wanted = count, left = size;
  for (;;) {
    for (; bins[bin] < wanted; --bin) wanted -= bins[bin];
    prefix |= bin << low;
    if (low == 0) return {prefix, wanted};
    const auto keep = [&](uint32_t rank, int64_t to) {  // no branch: which ranks are kept is not to be foreseen
      scratch[to] = rank;
      return to + (rank >> low == prefix >> low);
    };
    int64_t kept = 0;
    if (low == 32 - BITS)
      for (int64_t i = 0; i < left; ++i) kept = keep(rank_at(i), kept);
    else
      for (int64_t i = 0; i < left; ++i) kept = keep(scratch[i], kept);
    left = kept;
    const int next = low > BITS ? low - BITS : 0;
    bin = (1u << (low - next)) - 1;
    std::memset(bins, 0, sizeof bins);
    for (int64_t i = 0; i < left; ++i) ++bins[scratch[i] >> next & bin];
    low = next;
  }
}

constexpr int64_t FEW_SCORES = 4096;  // of which it costs more to go through many bins than to look at the scores once more

template <class RankAt>
Threshold threshold_of(RankAt rank_at, int64_t size, int64_t count, uint32_t* scratch) {
  return size < FEW_SCORES ? threshold_by<8>(rank_at, size, count, scratch) : threshold_by<11>(rank_at, size, count, scratch);
}

// The `count` best of `size` slots of these ranks, ascending; of equal ones the later. `scratch` holds `size` ranks.
template <class RankAt, class SlotAt>
void best_among(RankAt rank_at, SlotAt slot_at, int64_t size, int64_t count, uint32_t* scratch, int64_t* slots) {
  Threshold least = threshold_of(rank_at, size, count, scratch);
  int64_t place = count;
  for (int64_t i = size - 1; place > 0; --i) {
    const uint32_t rank = rank_at(i);
    const int64_t above = rank > least.rank, tied = rank == least.rank, wanted = least.ties > 0;
    slots[place - 1] = slot_at(i);
    place -= above | (tied & wanted);
    least.ties -= tied;
  }
}

constexpr int64_t SAMPLE = 1024;  // scores from which it is guessed what the `count`-th largest may be

// Collect into `candidates` the slots whose scores reach what somewhat more than `count` of them do, by a sample; how many these are.
// They may turn out to be fewer than `count`. `candidates` holds `size` slots.
int64_t collect_candidates(Collect collect, const float* scores, int64_t size, int64_t count, uint32_t* candidates) {
  const double expected = double(count) * SAMPLE / double(size);
  const int64_t wanted = int64_t(expected + 3 * std::sqrt(expected) + 3);  // of the sample: three standard deviations more
  if (size < FEW_SCORES || size > UINT32_MAX || wanted > SAMPLE / 3) return 0;
  const auto sampled = [&](int64_t i) { return scores[i * size / SAMPLE]; };
  const uint32_t rank = threshold_of([&](int64_t i) { return rank_of(sampled(i)); }, SAMPLE, wanted, candidates).rank;
  const uint32_t bits = rank & 0x80000000 ? rank ^ 0x80000000 : ~rank;
  float guess;
  std::memcpy(&guess, &bits, 4);
  return collect(scores, size, guess, candidates);
}

// The `count` best of `scores [size]`, ascending; of equal ones the later. `scratch` holds `size` numbers.
void best_of(Collect collect, const float* scores, int64_t size, int64_t count, uint32_t* scratch, int64_t* slots) {
  if (count >= size) {
    for (int64_t i = 0; i < size; ++i) slots[i] = i;
    return;
  }
  const int64_t found = collect_candidates(collect, scores, size, count, scratch);
  if (found < count || found > size / 3)
    return best_among([&](int64_t i) { return rank_of(scores[i]); }, [](int64_t i) { return i; }, size, count, scratch, slots);
  uint32_t* ranks = scratch + found;
  for (int64_t i = 0; i < found; ++i) ranks[i] = rank_of(scores[scratch[i]]);
  best_among([&](int64_t i) { return ranks[i]; }, [&](int64_t i) { return int64_t(scratch[i]); }, found, count, ranks + found, slots);
}

// As `best_of`. A page among the best has no less than the `count`-th largest of the maxima of sets, and few others have: only these are
// searched. `scratch` holds three numbers a page.
void best_pages(const float* bound, int64_t pages, int64_t count, uint32_t* scratch, int64_t* best) {
  int64_t members = 16;
  while (members > 1 && pages / members < 2 * count) members /= 2;
  if (members == 1 || count == 0) return best_of(collect_any, bound, pages, count, scratch, best);
  const int64_t sets = pages / members;  // of pages `sets` apart; the last few pages may be in none
  float* maxima = reinterpret_cast<float*>(scratch + pages);
  std::memcpy(maxima, bound, sizeof(float) * size_t(sets));
  for (int64_t m = 1; m < members; ++m)
    for (int64_t i = 0; i < sets; ++i) maxima[i] = bound[m * sets + i] > maxima[i] ? bound[m * sets + i] : maxima[i];
  std::nth_element(maxima, maxima + count - 1, maxima + sets, std::greater<float>());
  const float least = maxima[count - 1];
  uint32_t* candidates = scratch + 2 * pages;
  const int64_t found = collect_any(bound, pages, least, candidates);
  for (int64_t i = 0; i < found; ++i) maxima[i] = bound[candidates[i]];
  best_of(collect_any, maxima, found, count, scratch, best);
  for (int64_t i = 0; i < count; ++i) best[i] = candidates[best[i]];
}

double number(const void* base, int64_t kind, int64_t i) {
  if (kind == FP32) return static_cast<const float*>(base)[i];
  uint32_t bits = static_cast<const uint16_t*>(base)[i];
  float x;
  if (kind == BF16) {
    bits <<= 16;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent == 0 ? std::ldexp(double(fraction), -24)
                      : exponent < 31 ? std::ldexp(double(fraction + 1024), int(exponent) - 25)
                                      : (fraction ? NAN : INFINITY);
  return bits & 0x8000 ? -size : size;
}

}  // namespace

double cosine_of(const void* query, int64_t query_head, const void* former, int64_t kind, int64_t heads, int64_t dim) {
  constexpr int SUMS = 8;  // side by side: one alone would wait for each addition
  double product[SUMS] = {}, own[SUMS] = {}, before[SUMS] = {};
  const auto add = [&](int i, double x, double y) {
    product[i] += x * y;
    own[i] += x * x;
    before[i] += y * y;
  };
  for (int64_t h = 0; h < heads; ++h) {
    int64_t d = 0;
    if (kind == FP32)
      for (; d + SUMS <= dim; d += SUMS)
        for (int i = 0; i < SUMS; ++i)
          add(i, static_cast<const float*>(query)[h * query_head + d + i], static_cast<const float*>(former)[h * dim + d + i]);
    for (; d < dim; ++d) add(0, number(query, kind, h * query_head + d), number(former, kind, h * dim + d));
  }
  for (int i = 1; i < SUMS; ++i) {
    product[0] += product[i];
    own[0] += own[i];
    before[0] += before[i];
  }
  const double least = 1e-8;
  return product[0] / (std::fmax(std::sqrt(own[0]), least) * std::fmax(std::sqrt(before[0]), least));
}

int64_t collect_any(const float* scores, int64_t size, float least, uint32_t* slots) {
  int64_t found = 0;
  for (int64_t i = 0; i < size; ++i) {  // no branch: which scores reach it is not to be foreseen
    slots[found] = uint32_t(i);
    found += scores[i] >= least;
  }
  return found;
}

int best_slots(const BestSlots& o) { return best_slots_by(collect_any, o); }

int best_slots_by(Collect collect, const BestSlots& o) {
  if (o.rows == 0 || o.size == 0) return OK;
  int failed = 0;
#pragma omp parallel for schedule(static) num_threads(int(o.threads)) if (o.threads > 1 && o.rows > 1 && o.rows * o.size > 16384) \
    reduction(| : failed)
  for (int64_t row = 0; row < o.rows; ++row) {
    uint32_t* scratch = static_cast<uint32_t*>(std::malloc(sizeof(uint32_t) * size_t(o.size)));
    if (scratch)
      best_of(collect, o.scores + row * o.stride, o.size, o.count, scratch, o.slots + row * o.count);
    else
      failed |= 1;
    std::free(scratch);
  }
  return failed ? OUT_OF_MEMORY : OK;
}

int64_t page_scratch(const PageSlots& o) { return o.pages * 24 + 8; }

void page_slots_of(const PageSlots& o, int64_t i, void* scratch) {
  int64_t* best = static_cast<int64_t*>(scratch);
  float* bound = reinterpret_cast<float*>(best + o.pages);
  uint32_t* ranks = reinterpret_cast<uint32_t*>(bound + o.pages);
  const int64_t group = o.query_heads / o.kv_heads, pages = o.pages;
  const int64_t b = i / o.kv_heads, h = i % o.kv_heads, first = o.first ? o.first[b] : 0;
  const float* scores = o.scores + (b * o.query_heads + h * group) * pages;
  std::memcpy(bound, scores, sizeof(float) * size_t(pages));
  for (int64_t g = 1; g < group; ++g) {
    scores += pages;
    for (int64_t p = 0; p < pages; ++p)  // a NaN stays
      bound[p] = scores[p] > bound[p] || scores[p] != scores[p] ? scores[p] : bound[p];
  }
  for (int64_t p = 0; p < pages; ++p) bound[p] = bound[p] == bound[p] ? bound[p] : -INFINITY;
  const int64_t newest = (o.newest ? o.newest[i] : o.slots - 1 - first) / o.page_size;
  if (newest >= 0 && newest < pages) bound[newest] = INFINITY;
  best_pages(bound, pages, o.count, ranks, best);
  int64_t* to = o.index + i * o.count * o.page_size;
  for (int64_t n = 0; n < o.count; ++n, to += o.page_size) {
    const int64_t begin = best[n] * o.page_size + first, left = bound[best[n]] == -INFINITY ? 0 : o.slots - begin;
    for (int64_t k = 0; k < o.page_size; ++k) to[k] = k < left ? begin + k : -1;
  }
}

int page_slots(const PageSlots& o) {
  void* scratch = std::malloc(size_t(page_scratch(o)));
  if (!scratch) return OUT_OF_MEMORY;
  for (int64_t i = 0; i < o.batch * o.kv_heads; ++i) page_slots_of(o, i, scratch);
  std::free(scratch);
  return OK;
}

int listed_slots(const ListedSlots& l) {
  const int64_t total = l.sinks + l.top_k + l.local;
  for (int64_t i = 0; i < l.lists; ++i) {
    int64_t* to = l.index + i * total;
    for (int64_t k = 0; k < l.sinks; ++k) *to++ = k;
    std::memcpy(to, l.chosen + i * l.top_k, sizeof(int64_t) * size_t(l.top_k));
    to += l.top_k;
    for (int64_t k = 0; k < l.local; ++k) *to++ = l.slots - l.local + k;
  }
  return OK;
}

bool reused_slots(const ReusedSlots& r) {
  const int64_t item = r.kind == FP32 ? 4 : 2;
  for (int64_t b = 0; b < r.batch; ++b) {
    const char* query = static_cast<const char*>(r.query) + b * r.query_batch * item;
    const char* former = static_cast<const char*>(r.former) + b * r.query_heads * r.dim * item;
    if (!r.live[b] || !(cosine_of(query, r.query_head, former, r.kind, r.query_heads, r.dim) >= r.threshold)) return false;
  }
  listed_slots(r.listed);
  return true;
}
