// Which channels to read, and how far: what ops/triton/lists.py does for GPUs.
//
// There are two lists: pairs of slices that are read together (4 bits more of a channel) and
// singles (2 bits more). Level 2 is a single, level 4 a pair, level 6 a pair and a single, level 8
// two pairs. With q the code of an entry's slices, in `bits` bits, it contributes to an output
//
//     x * scale * factor * (q - (2**bits - 1) / 2)
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace grinqh {

constexpr int MAX_BLOCK = 128;  // of entries that are multiplied together

struct List {
  std::vector<uint32_t> lines;     // of a tile: where the first of an entry's slices is
  std::vector<uint32_t> channels;  // whose scales count
  std::vector<float> values;       // [padded rows, capacity]: x * factor, in units of the row
  int64_t size = 0, capacity = 0;

  void reserve(int64_t most, int64_t rows) {
    // A block more is read, but does not count; and vectors are whole.
    capacity = most + 2 * MAX_BLOCK;
    if ((int64_t)lines.size() < capacity) {
      lines.resize(capacity);
      channels.resize(capacity);
    }
    if ((int64_t)values.size() < rows * capacity) values.resize(rows * capacity);
    size = 0;
  }

  // x: of each row, in its unit.
  void append(Chosen chosen, Ints line, Ints channel, const Floats* x, int64_t rows,
              Floats factor) {
    chosen.store(lines.data() + size, line);
    chosen.store(channels.data() + size, channel);
    for (int64_t row = 0; row < rows; ++row)
      chosen.store(values.data() + row * capacity + size, x[row] * factor);
    size += chosen.count();
  }

  void finish(int64_t rows, int64_t padded_rows) {
    std::fill_n(lines.data() + size, MAX_BLOCK, 0);
    std::fill_n(channels.data() + size, MAX_BLOCK, 0);
    for (int64_t row = 0; row < padded_rows; ++row) {
      float* const row_values = values.data() + row * capacity;
      std::fill(row_values + (row < rows ? size : 0), row_values + size + MAX_BLOCK, 0.0f);
    }
  }
};

struct Lists {
  List pairs, singles;
  float unit[MAX_ROWS];  // of each row: a power of two, its largest |x| or little less
  // Channels are padded to whole vectors.
  std::vector<float> x;  // [rows, padded k]
  std::vector<float> sensitivity;
  std::vector<int32_t> low;
};

// Mean of |x| * sensitivity and the largest |x|, in one pass.
inline void measure(const float* x, const float* sensitivity, int64_t k, float& mean, float& top) {
  Floats sum = {}, largest = {};
  for (int64_t i = 0; i < k; i += LANES) {
    const Floats size = magnitude(load<Floats>(x + i));
    sum += size * load<Floats>(sensitivity + i);
    largest = larger_size(largest, size);
  }
  double total = 0;
  top = 0;
  for (int lane = 0; lane < LANES; ++lane) {
    total += sum[lane];
    top = std::max(top, largest[lane]);
  }
  mean = (float)(total / (double)k);
}

template <class From, class To>
void copy_padded(const From* from, int64_t size, int64_t padded, To* to) {
  std::copy_n(from, size, to);
  std::fill(to + size, to + padded, To());
}

// False if an activation is not finite, or so large that their sum is not.
inline bool build_lists(const Call& call, const Weight& weight, Lists& lists) {
  const int64_t k = call.k, rows = call.rows, padded = (k + LANES - 1) / LANES * LANES;
  const int steps = (int)call.num_levels - 1;
  lists.x.resize(rows * padded);
  lists.sensitivity.resize(padded);
  lists.low.resize(padded);
  with_type(call.dtype, [&](auto zero) {
    for (int64_t row = 0; row < rows; ++row)
      copy_padded((const decltype(zero)*)weight.x + row * k, k, padded, &lists.x[row * padded]);
  });
  copy_padded(weight.sensitivity, k, padded, lists.sensitivity.data());
  if (weight.low) copy_padded(weight.low, k, padded, lists.low.data());

  Floats thresholds[MAX_ROWS][MAX_LEVELS - 1], inverse[MAX_ROWS];
  for (int64_t row = 0; row < rows; ++row) {
    float mean, top;
    measure(&lists.x[row * padded], lists.sensitivity.data(), k, mean, top);
    if (!(mean <= FLT_MAX)) return false;
    if (weight.mean) mean = weight.mean[row];
    if (!(mean <= FLT_MAX)) return false;
    for (int j = 0; j < steps; ++j) {
      const float relative = weight.thresholds[steps + j];
      const float threshold = weight.thresholds[j] + (relative > 0 ? relative * mean : 0);
      thresholds[row][j] = Floats{} + (threshold > FLT_MAX ? FLT_MAX : threshold);
    }
    // Within these bounds neither the unit nor what it is inverted to overflows.
    const int exponent = top > 0 ? std::min(std::max(std::ilogb(top), -126), 126) : 0;
    lists.unit[row] = std::ldexp(1.0f, exponent);
    inverse[row] = Floats{} + 1 / lists.unit[row];
  }

  const int high = call.high_lines(), low = call.low_lines();
  const float* const gains = weight.gains;
  lists.pairs.reserve(2 * padded, call.padded_rows());
  lists.singles.reserve(padded, call.padded_rows());
  for (int64_t i = 0; i < k; i += LANES) {
    const Ints channel = lane_numbers() + (int32_t)i;
    // grading.grade, in slices. Rows share what is read: the most that any of them asks for.
    Ints slices = Ints{} + (int32_t)call.levels[0] / 2;
    Floats x[MAX_ROWS];
    for (int64_t row = 0; row < rows; ++row) {
      x[row] = load<Floats>(&lists.x[row * padded + i]);
      const Floats size = magnitude(x[row]) * load<Floats>(&lists.sensitivity[i]);
      for (int j = 0; j < steps; ++j)
        slices = larger(slices, (size > thresholds[row][j]) & (int32_t)call.levels[j + 1] / 2);
      x[row] *= inverse[row];
    }
    Ints place = channel;
    if (weight.low) {
      place = load<Ints>(&lists.low[i]);
      slices = (place < 0) & (slices > HIGH_SLICES) ? Ints{} + HIGH_SLICES : slices;
    }
    slices &= channel < (int32_t)k;
    const Ints high_line = channel * high, low_line = (int32_t)k * high + place * low;
    const auto gain = [&](Ints read) {
      const Floats upper = read == 4 ? Floats{} + gains[3] : Floats{} + gains[2];
      return read <= 2 ? (read == 2 ? Floats{} + gains[1] : Floats{} + gains[0]) : upper;
    };
    const Floats factor = gain(slices);
    lists.pairs.append(Chosen(slices >= 2), high_line, channel, x, rows, factor * 0.125f);
    lists.pairs.append(Chosen(slices == 4), low_line, channel, x, rows, factor * (0.125f / 16));
    const Ints alone = slices == 1;
    lists.singles.append(Chosen((slices & 1) == 1), alone ? high_line : low_line, channel, x, rows,
                         factor * (alone ? Floats{} + 0.5f : Floats{} + 0.5f / 16));
  }
  lists.pairs.finish(rows, call.padded_rows());
  lists.singles.finish(rows, call.padded_rows());
  return true;
}

}  // namespace grinqh
