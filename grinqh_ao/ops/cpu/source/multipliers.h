// How lines lie in vectors, and what their codes are multiplied with: x * scale, as integers in
// units of the largest of a block of channels. Of 15 bits for bfloat16, whose results have 8; of
// two parts, 30 bits, for float32 and float16.
#pragma once

#include "lists.h"

namespace grinqh {

constexpr int PART_BITS = 15;

// How lines of WORDS words lie in vectors.
template <int WORDS>
struct Shape {
  static constexpr int TILE = WORDS * FIELDS_PER_WORD;
  static constexpr int GROUPS = TILE / SCALE_GROUP;
  // Short lines: one vector holds those of several channels. Long ones take several vectors.
  static constexpr int CHANNELS = WORDS < LANES ? LANES / WORDS : 1;
  static constexpr int COLUMNS = WORDS < LANES ? 1 : WORDS / LANES;
  // Entries that are multiplied at once: CHANNELS in the low halves of lanes, as many in the high.
  static constexpr int STEP = 2 * CHANNELS;
  // Entries that are multiplied together, and fetched together from memory.
  static constexpr int BLOCK = CHANNELS > 1 ? 128 : 64;
  static_assert(BLOCK <= MAX_BLOCK);
  // In which lines are fetched: two in each column. Short lines are few, and come at once.
  static constexpr int PASSES = CHANNELS > 1 ? 1 : 2 * COLUMNS;
  // Of a row. Where a vector holds several channels, the lanes of each have sums of their own.
  using Sums = float[FIELDS_PER_WORD][WORDS * CHANNELS];
};

// 2 ** (i / 16)
alignas(64) constexpr float ROOTS[16] = {
    1.0f,        1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
    1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
    1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f,
};

// 2 ** ((code - 255) / 16), and 0 for code 0: codec.decode_scales.
inline Floats decode_scales(const uint8_t* codes) {
  const Ints code = from_bytes(codes);
  const Ints octave = ((code + 1) >> 4) - 16;
  return (Floats)(((Ints)look_up(ROOTS, code + 1) + (octave << 23)) & (code > 0));
}

// What a block of entries is multiplied with: integers in units of the largest of their group. Each
// word has those of an entry of the low halves of lanes, and of its partner in the high halves.
template <int WORDS, int ROWS, int PARTS>
struct Multipliers {
  using S = Shape<WORDS>;
  static constexpr int G = S::GROUPS;
  static constexpr int PERIOD = std::max(G, LANES);  // of groups among vectors of [entry, group]
  // [pairs of entries, groups]
  alignas(64) int32_t ints[ROWS][PARTS][S::BLOCK / 2 * G + LANES];
  alignas(64) float unit[ROWS][PERIOD];
  alignas(64) float total[ROWS][PERIOD];  // of a group's integers

  // For a step of entries and one group of outputs.
  Ints at(int row, int part, int step, int group) const {
    const int32_t* const from = ints[row][part] + step * S::CHANNELS * G + group;
    if constexpr (S::CHANNELS == 1) return Ints{} + *from;
    return permute(load<Ints>(from), lane_numbers() / WORDS * G);
  }
};

// Of a block's entries, the first half is multiplied in the low halves of lanes, the rest in the
// high ones: how many there are in a half, a whole number of steps.
template <int WORDS>
constexpr int half_of(int size) {
  using S = Shape<WORDS>;
  return (size + S::STEP - 1) / S::STEP * S::CHANNELS;
}

template <int WORDS, int ROWS, int PARTS>
void multiply_scales(const List& list, int64_t first, int size, int64_t first_row,
                     const uint8_t* scales, Multipliers<WORDS, ROWS, PARTS>& out) {
  using M = Multipliers<WORDS, ROWS, PARTS>;
  constexpr int G = M::G, PERIOD = M::PERIOD, VECTORS = PERIOD / LANES;
  constexpr int SPACE = Shape<WORDS>::BLOCK / 2 * G + PERIOD;
  constexpr float TOP = (1 << PART_BITS) - 1;
  constexpr float NOTHING = 1e-30f;  // beside the row's largest x, which is 1 or more
  constexpr float WHOLE = 3 << 22;   // added and subtracted, rounds to a whole number
  const int entries = half_of<WORDS>(size), values = entries * G;
  alignas(64) uint8_t codes[2][SPACE] = {};
  alignas(64) float scale[2][SPACE], value[2][SPACE];

  for (int half = 0; half < 2; ++half) {
    const uint32_t* const channels = list.channels.data() + first + half * entries;
    for (int i = 0; i < entries; ++i) {
      int64_t at = (int64_t)channels[i] * G;
      asm("" : "+r"(at));  // compilers would use instructions that gather, which are slower
      std::memcpy(codes[half] + i * G, scales + at, G);
    }
  }
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < values; i += LANES) store(scale[half] + i, decode_scales(codes[half] + i));

  for (int r = 0; r < ROWS; ++r) {
    const float* const x = list.values.data() + (first_row + r) * list.capacity + first;
    Floats largest[VECTORS] = {}, inverse[VECTORS], total[VECTORS] = {};
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < values; i += PERIOD) {
        for (int v = 0; v < VECTORS; ++v) {
          const int at = i + v * LANES, entry = half * entries + at / G;
          const Ints among = lane_numbers() / G;
          const Floats each = permute(load<Floats>(x + entry), among);
          // What fills a step up counts nothing.
          const Floats product = entry + among < std::min(size, (half + 1) * entries)
                                     ? each * load<Floats>(scale[half] + at)
                                     : Floats{};
          store(value[half] + at, product);
          largest[v] = larger_size(largest[v], magnitude(product));
        }
      }
    }
    for (int v = 0; v < VECTORS; ++v) {
      for (int width = LANES / 2; width >= G; width /= 2)
        largest[v] = larger_size(largest[v], permute(largest[v], lane_numbers() + width));
      inverse[v] = largest[v] > NOTHING ? TOP / largest[v] : Floats{};
      store(out.unit[r] + v * LANES, largest[v] * (1 / TOP));
    }
    for (int i = 0; i < values; i += PERIOD) {
      for (int v = 0; v < VECTORS; ++v) {
        const int at = i + v * LANES;
        Floats low = load<Floats>(value[0] + at) * inverse[v];
        Floats high = load<Floats>(value[1] + at) * inverse[v];
        float place = 1;
        for (int part = 0; part < PARTS; ++part) {
          const Floats whole_low = (low + WHOLE) - WHOLE, whole_high = (high + WHOLE) - WHOLE;
          total[v] += (whole_low + whole_high) * place;
          store(out.ints[r][part] + at, (__builtin_convertvector(whole_high, Ints) << 16) |
                                            (__builtin_convertvector(whole_low, Ints) & 0xFFFF));
          low = (low - whole_low) * (float)(1 << PART_BITS);
          high = (high - whole_high) * (float)(1 << PART_BITS);
          place /= 1 << PART_BITS;
        }
      }
    }
    for (int v = 0; v < VECTORS; ++v) {
      for (int width = LANES / 2; width >= G; width /= 2)
        total[v] += permute(total[v], lane_numbers() + width);
      store(out.total[r] + v * LANES, total[v]);
    }
  }
}

}  // namespace grinqh
