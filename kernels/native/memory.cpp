// Hints on memory. A system that does not know them does as it likes.
#include "memory.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

int prefer_large_pages(const Region& r) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const int64_t page = sysconf(_SC_PAGESIZE), first = (r.address + page - 1) / page * page;
  const int64_t last = (r.address + r.bytes) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), size_t(last - first), MADV_HUGEPAGE);
#else
  (void)r;
#endif
  return OK;
}
