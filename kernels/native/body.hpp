// Everything compiled once per instruction set, in the order it builds up.
#include "vector.hpp"
#include "common.hpp"
#include "slots.hpp"
#include "attention_few.hpp"
#include "attention_many.hpp"

extern const Level level;
const Level level = {attention};
