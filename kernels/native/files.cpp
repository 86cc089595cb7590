// Single rows of many small files: one call a layer, since an interpreter takes longer for a row than the system does.
// Whatever is not as expected is left to the caller, who looks at that file again and says what is wrong.
#include "files.hpp"

#if (defined(__unix__) || defined(__APPLE__)) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

namespace {

// XXH64 (Yann Collet, https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md), for little-endian machines.
constexpr uint64_t P1 = 0x9E3779B185EBCA87, P2 = 0xC2B2AE3D27D4EB4F, P3 = 0x165667B19E3779F9, P4 = 0x85EBCA77C2B2AE63,
                   P5 = 0x27D4EB2F165667C5;

uint64_t turned(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }
uint64_t mixed(uint64_t sum, uint64_t word) { return turned(sum + word * P2, 31) * P1; }
uint64_t merged(uint64_t hash, uint64_t sum) { return (hash ^ mixed(0, sum)) * P1 + P4; }

uint64_t word_at(const char* at) {
  uint64_t word;
  std::memcpy(&word, at, 8);
  return word;
}

uint64_t checksum(const char* data, int64_t bytes, uint64_t seed) {  // `bytes` is a multiple of 8
  const char* end = data + bytes;
  uint64_t hash = seed + P5;
  if (bytes >= 32) {
    uint64_t sums[4] = {seed + P1 + P2, seed + P2, seed, seed - P1};
    for (; end - data >= 32; data += 32)
      for (int lane = 0; lane < 4; ++lane) sums[lane] = mixed(sums[lane], word_at(data + lane * 8));
    hash = turned(sums[0], 1) + turned(sums[1], 7) + turned(sums[2], 12) + turned(sums[3], 18);
    for (uint64_t sum : sums) hash = merged(hash, sum);
  }
  hash += uint64_t(bytes);
  for (; data < end; data += 8) hash = turned(hash ^ mixed(0, word_at(data)), 27) * P1 + P4;
  hash = (hash ^ (hash >> 33)) * P2;
  hash = (hash ^ (hash >> 29)) * P3;
  return hash ^ (hash >> 32);
}

constexpr int CHECKSUM = 8;    // bytes behind each row's payload
constexpr int SPINS = 20000;   // some 10 microseconds: about as long as a file takes
constexpr int64_t MOST = 256;  // rows a call; three times as many pieces are below the least limit of any system
constexpr int64_t GAP = 8192;  // bytes between rows that are read for nothing rather than begin another call

// Rows `first … first + count - 1` of the list, which ascend in the file with small gaps: each payload to its place, and whether all are intact.
bool read_run(const ReadRows& r, int handle, int64_t file, int64_t first, int64_t count) {
  const int64_t width = r.payload + CHECKSUM, *numbers = r.numbers + first, *places = r.places + first;
  char nothing[GAP];
  iovec pieces[3 * MOST];
  uint64_t sums[MOST];
  int used = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t gap = i ? numbers[i] - numbers[i - 1] - 1 : 0;
    if (gap) pieces[used++] = {nothing, size_t(gap * width)};
    pieces[used++] = {r.output + places[i] * r.stride, size_t(r.payload)};
    pieces[used++] = {sums + i, CHECKSUM};
  }
  ssize_t got;
  do {
    got = preadv(handle, pieces, used, off_t(r.starts[file] + numbers[0] * width));
  } while (got < 0 && errno == EINTR);
  bool fine = got == (numbers[count - 1] - numbers[0] + 1) * width;
  for (int64_t i = 0; fine && i < count; ++i)
    fine = sums[i] == checksum(r.output + places[i] * r.stride, r.payload, r.seeds[file] ^ uint64_t(numbers[i]));
  return fine;
}

// Whether the row behind `row` of the list is read in the same call.
bool follows(const ReadRows& r, int64_t row) {
  const int64_t gap = r.numbers[row + 1] - r.numbers[row] - 1;
  return gap >= 0 && gap * (r.payload + CHECKSUM) <= GAP;
}

bool read_from(const ReadRows& r, int handle, int64_t item) {
  const int64_t end = r.firsts[item + 1];
  for (int64_t row = r.firsts[item], count; row < end; row += count) {
    for (count = 1; count < MOST && row + count < end && follows(r, row + count - 1);) ++count;
    if (!read_run(r, handle, r.files[item], row, count)) return false;
  }
  return true;
}

constexpr int OTHERS = 1024;  // handles below are left to others: select() knows no higher ones
constexpr rlim_t SHARE = 4;   // one part in so many of those that the process may have is kept at most

int64_t most_kept() {
  rlimit limit;
  return getrlimit(RLIMIT_NOFILE, &limit) == 0 ? int64_t(std::min(limit.rlim_cur, rlim_t(1) << 20) / SHARE) : 0;
}

int64_t kept = 0;  // files that are kept open, in the whole process

// Another handle of the file to keep, -1 where there are enough.
int kept_open(int handle) {
  static const int64_t most = most_kept();
  int high = -1;
  if (__atomic_add_fetch(&kept, 1, __ATOMIC_RELAXED) <= most) high = fcntl(handle, F_DUPFD_CLOEXEC, OTHERS);
  if (high < 0) __atomic_sub_fetch(&kept, 1, __ATOMIC_RELAXED);
  return high;
}

// Keep a file open, if nobody who reads the same files has done so meanwhile.
void keep(const ReadRows& r, int64_t file, int handle) {
  const int high = kept_open(handle);
  if (high < 0) return;
  int32_t none = -1;
  if (__atomic_compare_exchange_n(r.handles + file, &none, high, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
    __atomic_fetch_add(r.progress + 6, 1, __ATOMIC_RELAXED);
  else
    close_file({high});
}

bool read_file(const ReadRows& r, int64_t item) {
  const int64_t file = r.files[item];
  const int known = __atomic_load_n(r.handles + file, __ATOMIC_RELAXED);
  if (known >= 0) return read_from(r, known, item);
  const int flags = O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;
  const int handle = openat(int(r.directory), r.names + file * r.name_bytes, flags);
  if (handle < 0) return false;
  struct stat facts;
  const bool fine = fstat(handle, &facts) == 0 && S_ISREG(facts.st_mode) && facts.st_size == r.sizes[file] && read_from(r, handle, item);
  if (fine) keep(r, file, handle);
  close(handle);
  return fine;
}

int64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

// Files in their order, until none is left or one before them is not as expected. How many were read.
int64_t read_files(const ReadRows& r) {
  int64_t *next = r.progress, *failed = r.progress + 1, files = 0;
  for (;;) {
    const int64_t item = __atomic_fetch_add(next, 1, __ATOMIC_SEQ_CST);
    int64_t first = __atomic_load_n(failed, __ATOMIC_RELAXED);
    if (item >= r.count || item >= first) return files;
    ++files;
    if (read_file(r, item)) continue;
    while (item < first && !__atomic_compare_exchange_n(failed, &first, item, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
  }
}

}  // namespace

int read_rows(const ReadRows& r) {
  int64_t *reading = r.progress + 2, begin = nanoseconds();
  if (r.helps) __atomic_fetch_add(reading, 1, __ATOMIC_SEQ_CST);  // before it takes a file: who finds none left waits for it
  int64_t files = 0;
#pragma omp parallel num_threads(int(r.threads)) if (r.threads > 1 && r.count > 3) reduction(+ : files)
  files += read_files(r);
  if (r.helps) {
    __atomic_fetch_sub(reading, 1, __ATOMIC_SEQ_CST);
    return OK;
  }
  __atomic_store_n(r.progress, r.count, __ATOMIC_SEQ_CST);  // a helper that comes later finds none, after a failure too
  const int64_t end = nanoseconds();
  const timespec moment = {0, 20000};
  for (int tries = 0; __atomic_load_n(reading, __ATOMIC_SEQ_CST) > 0; ++tries)
    if (tries > SPINS) nanosleep(&moment, nullptr);
  r.progress[3] = files;
  r.progress[4] = end - begin;
  r.progress[5] = nanoseconds() - end;
  return OK;
}

int close_file(const CloseFile& c) {
  close(int(c.handle));
  __atomic_sub_fetch(&kept, 1, __ATOMIC_RELAXED);
  return OK;
}

#else

int read_rows(const ReadRows& r) {
  r.progress[1] = 0;
  return OK;
}

int close_file(const CloseFile&) { return OK; }

#endif
