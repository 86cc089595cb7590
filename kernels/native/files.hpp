#pragma once
#include "arguments.hpp"

struct ReadRows {
  int64_t threads;
  int64_t directory;           // an open handle
  const char* names;           // of the files in it, `name_bytes` each, ended by 0
  int64_t name_bytes;
  const int64_t* sizes;        // bytes that each file must have
  const int64_t* starts;       // bytes before its rows
  const uint64_t* seeds;       // of the checksums of its rows
  const int64_t* files;        // [count] which of them to read
  int32_t* handles;            // of the files, of those that were kept open, -1 for another, which this call may keep open too
  int64_t count;
  const int64_t* firsts;       // [count + 1] which of `numbers` are each one's own
  const int64_t* numbers;      // of the rows to read
  const int64_t* places;       // where each of them goes, in rows of the output
  int64_t payload;             // bytes of a row before its checksum, a multiple of 8
  char* output;
  int64_t stride;              // bytes from one of its rows to the next
  int64_t helps;               // not 0: for another call, which has the same `progress` and waits for this one where it reads a file
  int64_t* progress;           // [7]: which of `files` is next, the first that is not as expected, and how many helpers are reading;
                               // of the call that is helped: files it read, nanoseconds it took for them, and waited then; files kept open
};

struct CloseFile {
  int64_t handle;              // of a file that `read_rows` kept open
};

int read_rows(const ReadRows&);
int close_file(const CloseFile&);
