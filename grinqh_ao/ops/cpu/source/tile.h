// A part of the products of one tile of outputs; compiled once for each length of lines.
#pragma once

#include "lists.h"

namespace grinqh {

// Entries part / parts .. (part + 1) / parts of both lists, to out [call.padded_rows(), tile].
using AddTile = void(const Call& call, const Weight& weight, const Lists& lists, int64_t tile,
                     int64_t part, int64_t parts, float* out);

AddTile add_tile_4, add_tile_8, add_tile_16, add_tile_32;

inline AddTile* add_tile(int64_t words) {
  return words == 4 ? add_tile_4 : words == 8 ? add_tile_8 : words == 16 ? add_tile_16 : add_tile_32;
}

}  // namespace grinqh
