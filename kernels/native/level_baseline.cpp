// Four lanes, with nothing but what every machine of the architecture has (SSE2, NEON).
#include "prelude.hpp"

#define LANES 4
namespace baseline {
#include "body.hpp"
}
