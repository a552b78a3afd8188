// A part of the products of one tile of outputs; compiled once for each length of lines.
#pragma once

#include "lists.h"

namespace grinqh {

// What a thread does at a time: a tile times entries part / parts .. (part + 1) / parts of both
// lists.
struct Unit {
  const Weight* weight;
  const Lists* lists;
  int64_t tile, part, parts;

  const uint32_t* lines() const { return weight->slices + tile * weight->lines * weight->words; }
  const uint8_t* scales(int64_t k) const {
    return weight->scales + tile * k * (weight->tile() / SCALE_GROUP);
  }
  int64_t start(const List& list) const { return list.size * part / parts; }
  int64_t end(const List& list) const { return list.size * (part + 1) / parts; }
};

// To out [call.padded_rows(), tile]. The first entries are on their way already if `fetched`; those
// of the `next` unit, if there is one, are fetched on the way: its lines are as long.
using AddTile = void(const Call& call, const Unit& unit, bool fetched, const Unit* next,
                     float* out);

AddTile add_tile_4, add_tile_8, add_tile_16, add_tile_32;

inline AddTile* add_tile(int64_t words) {
  switch (words) {
    case 4: return add_tile_4;
    case 8: return add_tile_8;
    case 16: return add_tile_16;
    default: return add_tile_32;
  }
}

}  // namespace grinqh
