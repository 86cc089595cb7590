// Single rows of many small files: one call a layer, since an interpreter takes longer for a row than the system does.
// Whatever is not as expected is left to the caller, who looks at that file again and says what is wrong.
#include "files.hpp"

#if (defined(__unix__) || defined(__APPLE__)) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#include <cerrno>
#include <cstring>
#include <fcntl.h>
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

bool is_intact(const ReadRows& r, int64_t file, int64_t row) {
  const char* data = r.output + r.places[row] * r.stride;
  const int64_t bytes = r.width - 8;
  return word_at(data + bytes) == checksum(data, bytes, r.seeds[file] ^ uint64_t(r.numbers[row]));
}

constexpr int64_t MOST = 256;  // rows a call; below the least limit of any system

// Rows `first … first + count - 1` of the list, which lie side by side in the file.
bool read_run(const ReadRows& r, int handle, int64_t file, int64_t first, int64_t count) {
  iovec pieces[MOST];
  for (int64_t i = 0; i < count; ++i) {
    pieces[i].iov_base = r.output + r.places[first + i] * r.stride;
    pieces[i].iov_len = size_t(r.width);
  }
  ssize_t got;
  do {
    got = preadv(handle, pieces, int(count), off_t(r.starts[file] + r.numbers[first] * r.width));
  } while (got < 0 && errno == EINTR);
  return got == count * r.width;
}

bool read_file(const ReadRows& r, int64_t file) {
  const int flags = O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;
  const int handle = openat(int(r.directory), r.names + file * r.name_bytes, flags);
  if (handle < 0) return false;
  struct stat facts;
  bool fine = fstat(handle, &facts) == 0 && S_ISREG(facts.st_mode) && facts.st_size == r.sizes[file];
  const int64_t end = r.firsts[file + 1];
  for (int64_t row = r.firsts[file]; fine && row < end;) {
    int64_t count = 1;
    while (count < MOST && row + count < end && r.numbers[row + count] == r.numbers[row] + count) ++count;
    fine = read_run(r, handle, file, row, count);
    for (; count > 0; --count, ++row) fine = fine && is_intact(r, file, row);
  }
  close(handle);
  return fine;
}

}  // namespace

int read_rows(const ReadRows& r) {
  int64_t failed = r.files;  // the first that is not as expected
#pragma omp parallel for schedule(dynamic) num_threads(int(r.threads)) if (r.threads > 1 && r.files > 3) reduction(min : failed)
  for (int64_t file = 0; file < r.files; ++file)
    if (file < failed && !read_file(r, file)) failed = file;
  *r.done = failed;
  return OK;
}

#else

int read_rows(const ReadRows& r) {
  *r.done = 0;
  return OK;
}

#endif
