// Everything compiled once per instruction set, in the order it builds up.
#include "vector.hpp"
#include "common.hpp"
#include "sums.hpp"
#include "slots.hpp"
#include "turned.hpp"
#include "attention_few.hpp"
#include "attention_many.hpp"
#include "mass.hpp"
#include "rounding.hpp"
#include "planes.hpp"
#include "int4.hpp"
#include "vote.hpp"
#include "products.hpp"
#include "pages.hpp"
#include "choose_pages.hpp"
#include "rotation.hpp"
#include "packing.hpp"
#include "voted_slots.hpp"

extern const Level level;
const Level level = {attention,   attention_mass, head_vote, group_products, page_bounds,
                     page_scores, choose_pages,   rotate,    pack_int8,      pack_int4, voted_slots};
