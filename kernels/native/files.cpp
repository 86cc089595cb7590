// Single rows of many small files: one call a layer, since an interpreter takes longer for a row than the system does.
// Whatever is not as expected is left to the caller, who looks at that file again and says what is wrong.
#include "files.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <cerrno>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

namespace {

constexpr int64_t MOST = 256;  // rows a call; below the least limit of any system

// Rows `first … first + count - 1` of the list, which lie side by side in the file.
bool read_run(const ReadRows& r, int handle, int64_t file, int64_t first, int64_t count) {
  iovec pieces[MOST];
  for (int64_t i = 0; i < count; ++i) {
    pieces[i].iov_base = r.output + r.places[first + i] * r.width;
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
    row += count;
  }
  close(handle);
  return fine;
}

}  // namespace

int read_rows(const ReadRows& r) {
  int64_t file = 0;
  while (file < r.files && read_file(r, file)) ++file;
  *r.done = file;
  return OK;
}

#else

int read_rows(const ReadRows& r) {
  *r.done = 0;
  return OK;
}

#endif
