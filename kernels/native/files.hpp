#pragma once
#include "arguments.hpp"

struct ReadRows {
  int64_t threads;
  int64_t directory;           // an open handle
  const char* names;           // of the files in it, `name_bytes` each, ended by 0
  int64_t name_bytes, files;
  const int64_t* sizes;        // bytes that each file must have
  const int64_t* starts;       // bytes before its rows
  const int64_t* firsts;       // [files + 1] which of `numbers` are its own
  const int64_t* numbers;      // of the rows to read
  const int64_t* places;       // where each of them goes, in rows of the output
  const uint64_t* seeds;       // of the checksums of each file's rows
  int64_t width;               // bytes of a row, the last 8 of which are its checksum
  char* output;
  int64_t stride;              // bytes from one of its rows to the next
  int64_t* done;               // files that were read, from the first on; the next one is not as expected
};

int read_rows(const ReadRows&);
