// System headers for every level: included before a level's target pragma, so that no shared inline function is compiled for
// an instruction set the machine may lack.
#pragma once
#include <math.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "arguments.hpp"
#include "choosing.hpp"

static inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}
