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
#include "vectors.h"

namespace grinqh {

constexpr int BLOCK = 64;  // entries that are multiplied together

struct Entry {
  uint32_t line;     // of a tile: where the first of the slices is
  uint32_t channel;  // whose scales count
};

struct List {
  std::vector<Entry> entries;  // [capacity]
  std::vector<float> factor;   // [capacity]
  std::vector<float> values;   // [padded rows, capacity]: x * factor, in units of the row
  int64_t size = 0, capacity = 0;

  void reserve(int64_t most, int64_t rows) {
    capacity = most + BLOCK;  // a block more is read, but does not count
    if ((int64_t)entries.size() < capacity) {
      entries.resize(capacity);
      factor.resize(capacity);
    }
    if ((int64_t)values.size() < rows * capacity) values.resize(rows * capacity);
  }
};

// Where a list is being written.
struct Writer {
  Entry* __restrict entry;
  float* __restrict factor;

  // Always writes and goes on only if `there`: as good as random, a branch would be mispredicted.
  void add(bool there, uint32_t line, uint32_t channel, float weighs) {
    *entry = {line, channel};
    *factor = weighs;
    entry += there;
    factor += there;
  }
};

struct Lists {
  List pairs, singles;
  float unit[MOST_ROWS];  // of each row: a power of two, its largest |x| or little less
  std::vector<float> x;   // [rows, k]
  std::vector<float> sensitivity;
  std::vector<int32_t> slices;
};

// Mean of |x| * sensitivity and the largest |x|, in one pass.
inline void measure(const float* x, const float* sensitivity, int64_t k, float& mean, float& top) {
  Floats sum = {}, largest = {};
  int64_t i = 0;
  for (; i + LANES <= k; i += LANES) {
    const Floats value = load<Floats>(x + i);
    const Floats magnitude = (Floats)((Words)value & 0x7FFFFFFFu);
    sum += magnitude * load<Floats>(sensitivity + i);
    largest = larger(largest, magnitude);
  }
  double total = 0;
  top = 0;
  for (int lane = 0; lane < LANES; ++lane) {
    total += sum[lane];
    top = std::max(top, largest[lane]);
  }
  for (; i < k; ++i) {
    const float magnitude = std::fabs(x[i]);
    total += magnitude * sensitivity[i];
    top = std::max(top, magnitude);
  }
  mean = (float)(total / (double)k);
}

// grading.grade, in slices; where a row asks for more than those before it.
inline void grade(const float* x, const float* sensitivity, const float* thresholds, float mean,
                  const Call& call, int32_t* slices) {
  const int steps = (int)call.num_levels - 1;
  for (int j = 0; j < steps; ++j) {
    float threshold = thresholds[j] + (thresholds[steps + j] > 0 ? thresholds[steps + j] * mean : 0);
    threshold = threshold > FLT_MAX ? FLT_MAX : threshold;
    const int32_t wanted = (int32_t)call.levels[j + 1] / 2;
    for (int64_t i = 0; i < call.k; ++i) {
      const bool above = std::fabs(x[i]) * sensitivity[i] > threshold;
      const int32_t asked = above ? wanted : 0;
      slices[i] = slices[i] < asked ? asked : slices[i];
    }
  }
}

// False if an activation is not finite, or so large that their sum is not.
inline bool build_lists(const Call& call, const Weight& weight, Lists& lists) {
  const int64_t k = call.k, rows = call.rows;
  for (const void* soon : {(const void*)weight.gains, (const void*)weight.row_scale, weight.bias})
    __builtin_prefetch(soon);
  lists.x.resize(rows * k);
  lists.sensitivity.resize(k);
  lists.slices.assign(k, (int32_t)call.levels[0] / 2);
  with_type(call.dtype, [&](auto zero) {
    std::copy_n((const decltype(zero)*)weight.x, rows * k, lists.x.data());
  });
  std::copy_n(weight.sensitivity, k, lists.sensitivity.data());

  // Rows share what is read: a channel's level is the highest that any of them asks for.
  for (int64_t row = 0; row < rows; ++row) {
    const float* x = lists.x.data() + row * k;
    float mean, top;
    measure(x, lists.sensitivity.data(), k, mean, top);
    if (!(mean <= FLT_MAX)) return false;
    grade(x, lists.sensitivity.data(), weight.thresholds, mean, call, lists.slices.data());
    // Within these bounds neither the unit nor what it is inverted to overflows.
    const int exponent = top > 0 ? std::min(std::max(std::ilogb(top), -126), 126) : 0;
    lists.unit[row] = std::ldexp(1.0f, exponent);
  }

  const int64_t high = call.high_lines(), low = call.low_lines();
  float pair[5], single[5];  // by slices that are read
  for (int s = 0; s < 5; ++s) {
    const float gain = s ? weight.gains[s - 1] : 0;
    pair[s] = gain * 0.125f;
    single[s] = gain * (s == 1 ? 0.5f : 0.5f / 16);
  }
  lists.pairs.reserve(2 * k, call.padded_rows());
  lists.singles.reserve(k, call.padded_rows());
  Writer pairs{lists.pairs.entries.data(), lists.pairs.factor.data()};
  Writer singles{lists.singles.entries.data(), lists.singles.factor.data()};
  const int32_t* const slices = lists.slices.data();
  for (int64_t i = 0; i < k; ++i) {
    int32_t s = slices[i];
    int64_t place = i;
    if (weight.low) {
      place = weight.low[i];
      s = place < 0 ? std::min(s, HIGH_SLICES) : s;
    }
    const auto high_line = (uint32_t)(i * high), low_line = (uint32_t)(k * high + place * low);
    pairs.add(s >= 2, high_line, i, pair[s]);
    pairs.add(s == 4, low_line, i, pair[s] / 16);
    singles.add(s & 1, s == 1 ? high_line : low_line, i, single[s]);
  }
  lists.pairs.size = pairs.entry - lists.pairs.entries.data();
  lists.singles.size = singles.entry - lists.singles.entries.data();

  for (List* list : {&lists.pairs, &lists.singles}) {
    std::fill_n(list->entries.data() + list->size, BLOCK, Entry{});
    for (int64_t row = 0; row < call.padded_rows(); ++row) {
      const float* const x = lists.x.data() + row * k;
      float* const values = list->values.data() + row * list->capacity;
      const float inverse = row < rows ? 1 / lists.unit[row] : 0;
      const int64_t size = row < rows ? list->size : 0;
      for (int64_t e = 0; e < size; ++e)
        values[e] = x[list->entries[e].channel] * inverse * list->factor[e];
      std::fill_n(values + size, list->size - size + BLOCK, 0.0f);
    }
  }
  return true;
}

}  // namespace grinqh
