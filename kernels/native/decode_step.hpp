#pragma once
#include "arguments.hpp"
#include "columns.hpp"
#include "eviction.hpp"
#include "places.hpp"

#include <memory>
#include <new>

// What a decoded token does in a layer: calls for its parts are given as for the operations of their own, and what
// differs from token to token is put in here.
struct DecodeStep {
  DecodedToken token;
  Overwrite rows[2];   // of its key and value
  Rotation back[2];    // of its key into its slot, and of its query
  VotedSlots vote;
  ChoosePages pages;
  FindPlaces places;   // of the slots chosen
  Attention attention;
  Eviction eviction;
  bool turned, voted, paged, placed, evicts, anew = false, missing = false;
  const Level& level;

  explicit DecodeStep(const Level& used) : level(used) {}

  int take_in() {
    const DecodedToken& t = token;
    rows[0].source = static_cast<const char*>(t.key);
    rows[1].source = static_cast<const char*>(t.value);
    rows[0].same = rows[1].same = t.slot;
    int status = overwrite(rows[1]);
    if (!status && (t.stored || !turned)) status = overwrite(rows[0]);
    back[0].source = t.key;
    back[0].output = rows[0].column + t.slot * rows[0].slot_stride;
    back[1].source = t.query;
    for (int i = t.stored ? 1 : 0; i < 2 && turned && !status; ++i) {
      back[i].cosine = t.cosine;
      back[i].sine = t.sine;
      status = level.rotate(back[i]);
    }
    return status;
  }

  int choose() {
    int status = OK;
    if (voted) status = level.voted_slots(vote, &anew);
    if (!status && paged) status = level.choose_pages(pages);
    if (!status && placed) status = find_places(places);
    missing = !status && placed && *places.missing > 0;
    return status;
  }

  int attend() {
    attention.threads = token.threads;
    attention.query = turned ? back[1].output : token.query;
    attention.output = token.output;
    if (token.slots) attention.slots.slots = token.slots;
    if (token.index) attention.slots.index = token.index;
    if (!evicts) return level.attention(attention);
    std::unique_ptr<float[]> weights;
    if (attention.weights_reduction) {
      const Weakest& heads = eviction.weakest;
      weights.reset(new (std::nothrow) float[size_t(heads.batch * heads.heads * heads.slots)]);
      if (!weights) return OUT_OF_MEMORY;
      attention.weights = weights.get();
      attention.weights_entries = heads.slots;
    }
    const int status = level.attention(attention);
    return status ? status : evict(eviction, token.positions, token.position_batch, weights.get());
  }

  int run() {
    if (!token.found) {
      if (const int status = take_in()) return status;
      if (const int status = choose()) return status;
      if (missing) return OK;
    }
    return attend();
  }
};
