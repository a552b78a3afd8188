// What Python hands over: rows of 64-bit integers that binding.py packs.
#pragma once

#include <algorithm>
#include <cstdint>

namespace grinqh {

constexpr int SCALE_GROUP = 64;      // codec.py
constexpr int HIGH_SLICES = 2;       // slices.py
constexpr int FIELDS_PER_WORD = 16;  // slices.py
constexpr int MOST_ROWS = 8;
constexpr int MOST_LEVELS = 5;

struct Call {
  int64_t weights;
  int64_t rows;
  int64_t k;
  int64_t bfloat16;  // else float32
  int64_t threads;
  int64_t stored;  // bits
  int64_t level;   // bits, of dequantize
  int64_t num_levels;
  int64_t levels[MOST_LEVELS];

  int high_lines() const { return std::min((int)stored / 2, HIGH_SLICES); }
  int low_lines() const { return (int)stored / 2 - high_lines(); }
  // Rows are multiplied 4, 2 or 1 at a time; 3 are taken for 4.
  int64_t padded_rows() const { return rows + (rows % 4 == 3); }
};

struct Weight {
  const void* x;                // [rows, k], float32 or bfloat16
  const uint32_t* slices;       // [tiles, lines, words]
  const uint8_t* scales;        // [tiles, k, tile / 64]
  const uint16_t* row_scale;    // bfloat16 [n]
  const uint16_t* sensitivity;  // bfloat16 [k]
  const float* thresholds;      // [2, levels - 1]
  const float* gains;           // [4]
  const void* bias;             // [n] or null, in the type of x
  const int32_t* low;           // [k] in compact storage, else null
  void* out;                    // [rows, n], in the type of x
  int64_t n;
  int64_t lines;
  int64_t words;

  int64_t tile() const { return words * FIELDS_PER_WORD; }
  int64_t tiles() const { return (n + tile() - 1) / tile(); }
};

}  // namespace grinqh
