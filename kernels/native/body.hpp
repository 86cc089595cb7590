// Everything compiled once per instruction set, in the order it builds up.
#include "vector.hpp"
#include "common.hpp"
#include "sums.hpp"
#include "slots.hpp"
#include "turned.hpp"
#include "slot_factors.hpp"
#include "attention_few.hpp"
#include "attention_many.hpp"
#include "mass.hpp"
#include "rounding.hpp"
#include "planes.hpp"
#include "words.hpp"
#include "int4.hpp"
#include "int8.hpp"
#include "rounded.hpp"
#include "vote.hpp"
#include "products.hpp"
#include "pages.hpp"
#include "choose_pages.hpp"
#include "rotation.hpp"
#include "packing.hpp"
#include "voted_slots.hpp"

template <bool VNNI>
constexpr Level with_vote = {attention,   attention_mass, head_vote<VNNI>, group_products, page_bounds, page_scores,
                             choose_pages, rotate,        pack_int8,       pack_int4,      voted_slots<head_vote<VNNI>>};

extern const Level level;
const Level level = with_vote<false>;
#if LANES == 16
extern const Level level_vnni;
const Level level_vnni = with_vote<true>;
#endif
