// What the kernels are handed, and the kernels.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>

namespace grinqh {

constexpr int SCALE_GROUP = 64;      // codec.py
constexpr int HIGH_SLICES = 2;       // slices.py
constexpr int FIELDS_PER_WORD = 16;  // slices.py
constexpr int MAX_ROWS = 8;
constexpr int MAX_LEVELS = 5;

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

enum class Dtype { FLOAT32, BFLOAT16, FLOAT16 };

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::FLOAT32 ? 4 : 2; }

// Calls function(T()) for the type T that is meant.
template <class Function>
void with_type(Dtype dtype, Function&& function) {
  if (dtype == Dtype::FLOAT32)
    function(float());
  else if (dtype == Dtype::BFLOAT16)
    function(BFloat16());
  else
    function(Half());
}

struct Call {
  Dtype dtype;  // of activations, biases and outputs
  int64_t rows;
  int64_t k;
  int64_t threads;
  int64_t stored_bits;  // of a code
  int64_t num_levels;
  int64_t levels[MAX_LEVELS];

  int high_lines() const { return std::min((int)stored_bits / 2, HIGH_SLICES); }
  int low_lines() const { return (int)stored_bits / 2 - high_lines(); }
  // Rows are multiplied 4, 2 or 1 at a time; 3 are taken for 4.
  int64_t padded_rows() const { return rows + (rows % 4 == 3); }
};

// Parts of a weight's vectors: see vectors.py.
constexpr int64_t GAINS_AT = 8;
constexpr int64_t SENSITIVITY_AT = 12;
inline int64_t row_scale_at(int64_t k) { return SENSITIVITY_AT + (k + 3) / 4 * 4; }

struct Weight {
  const void* x;             // [rows, k]
  const uint32_t* slices;    // [tiles, lines, words]
  const uint8_t* scales;     // [tiles, k, tile / 64]
  const float* thresholds;   // [2, levels - 1]
  const float* gains;        // [4]
  const float* sensitivity;  // [k]
  const float* row_scale;    // [n]
  const void* bias;          // [n] or null
  const int32_t* low;        // [k] in compact storage, else null
  const float* mean;         // [rows] where x is a part of a row, else null
  void* out;                 // [rows, n]
  int64_t n;
  int64_t lines;
  int64_t words;

  int64_t tile() const { return words * FIELDS_PER_WORD; }
  int64_t tiles() const { return (n + tile() - 1) / tile(); }
};

// Returns false and writes nothing if activations are not finite: integers cannot express them.
bool decode(const Call& call, const Weight* weights, int64_t count);

// Writes the weight at `level` to weight.out [n, k], or transposed to [k, tiles * tile].
void dequantize(const Call& call, const Weight& weight, int64_t level, bool transposed);

}  // namespace grinqh
