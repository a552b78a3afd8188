// Lines of 2-bit fields times activations: the loops that all the time goes into.
//
// Two channels lie in the two halves of a vector's 32-bit lanes, and one instruction multiplies
// both with integers of 16 bits and adds both products to a sum. A field is masked out where it
// stands; each of a word's fields has sums of its own in registers. So 32 weights take one logic
// instruction and one multiply-add. The two slices of a pair are merged into nibbles first.
//
// What the codes are multiplied with, x * scale, becomes integers in units of the largest of a
// block of channels: of 15 bits for bfloat16, whose results have 8; of two parts, 29 bits, for
// float32.
#pragma once

#include "tile.h"

namespace grinqh {

constexpr int ROWS_AT_ONCE = 4;
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
  static_assert(BLOCK <= MOST_IN_A_BLOCK);
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
  alignas(64) int32_t ints[ROWS][PARTS][S::BLOCK / 2 * G + LANES];  // [pairs of entries, groups]
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
  constexpr int G = out.G, PERIOD = out.PERIOD, VECTORS = PERIOD / LANES;
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

// Two slices' words -> words of nibbles 4 * upper + lower: of even fields, and of odd ones.
inline Words even_nibbles(Words upper, Words lower) {
  return ((upper << 2) & 0xCCCCCCCCu) | (lower & 0x33333333u);
}
inline Words odd_nibbles(Words upper, Words lower) {
  return (upper & 0xCCCCCCCCu) | ((lower >> 2) & 0x33333333u);
}

// The same half of two words, side by side.
inline Words low_halves(Words a, Words b) { return (a & 0xFFFFu) | (b << 16); }
inline Words high_halves(Words a, Words b) { return (a >> 16) | (b & 0xFFFF0000u); }

// Entries that will be multiplied, and of which tile.
struct Ahead {
  const List* list;
  int64_t first;
  const uint32_t* tile;
  const uint8_t* scales;

  // Fetches one pass's share of an entry's lines, and with the first its scales, into the
  // second-level cache. Cores can wait for only some 20 lines at a time, and stop when they want
  // more; so fetching is spread evenly over the work. (GCC takes what only prefetches for a function
  // without effects, and leaves it out if it is not inlined early.)
  template <int WORDS, int LINES, int PASS>
  __attribute__((always_inline)) void fetch(int64_t entry) const {
    constexpr int BYTES = 4 * WORDS * LINES, PASSES = Shape<WORDS>::PASSES;
    const auto* line = (const char*)(tile + (int64_t)list->lines[first + entry] * WORDS);
#pragma GCC unroll 8
    for (int at = 0; at < BYTES; at += 64)
      if (at * PASSES / BYTES == PASS) __builtin_prefetch(line + at, 0, 2);
    if (PASS == 0 && Shape<WORDS>::GROUPS > 1)
      __builtin_prefetch(scales + (int64_t)list->channels[first + entry] * Shape<WORDS>::GROUPS, 0, 2);
  }
};

// One column of a block's words, as they are multiplied. Fields are in the order in which they lie
// there: of singles 0, 1, .. 15, of pairs 0, 2, .. 14, 1, 3, .. 15.
template <int WORDS, bool PAIRS>
struct Halves {
  using S = Shape<WORDS>;
  static constexpr int BITS = PAIRS ? 4 : 2;
  static constexpr int VECTORS = PAIRS ? 4 : 2;
  static constexpr int FIELDS = FIELDS_PER_WORD / VECTORS;  // of a vector
  Words words[S::BLOCK / S::STEP][VECTORS];

  static constexpr int field(int i) { return PAIRS ? i % 8 * 2 + i / 8 : i; }

  template <int NEXT_LINES>
  void gather(const Ahead& now, int size, int column, const Ahead& next) {
    const int half = half_of<WORDS>(size);
    for (int step = 0; step * S::STEP < size; ++step) {
      const uint32_t* lines[S::STEP];
      for (int c = 0; c < S::STEP; ++c) {
        const int entry = step * S::CHANNELS + c % S::CHANNELS + (c < S::CHANNELS ? 0 : half);
        lines[c] = now.tile + (int64_t)now.list->lines[now.first + entry] * WORDS + column * LANES;
        if constexpr (S::PASSES == 1) next.fetch<WORDS, NEXT_LINES, 0>(entry);
      }
      const Words a = join<WORDS>(lines), b = join<WORDS>(lines + S::CHANNELS);
      if constexpr (PAIRS) {
        for (auto& at : lines) at += WORDS;
        const Words lower_a = join<WORDS>(lines), lower_b = join<WORDS>(lines + S::CHANNELS);
        const Words even_a = even_nibbles(a, lower_a), even_b = even_nibbles(b, lower_b);
        const Words odd_a = odd_nibbles(a, lower_a), odd_b = odd_nibbles(b, lower_b);
        words[step][0] = low_halves(even_a, even_b);
        words[step][1] = high_halves(even_a, even_b);
        words[step][2] = low_halves(odd_a, odd_b);
        words[step][3] = high_halves(odd_a, odd_b);
      } else {
        words[step][0] = low_halves(a, b);
        words[step][1] = high_halves(a, b);
      }
    }
    if constexpr (S::PASSES == 1)
      for (int e = 2 * half; e < S::BLOCK; ++e) next.fetch<WORDS, NEXT_LINES, 0>(e);
  }
};

// Adds FIELDS of each word from FIRST on to sums [ROWS][fields][words], in lanes as they come. On the
// way a part of the lines of the block that comes next is fetched.
template <int WORDS, int ROWS, int PARTS, bool PAIRS, int NEXT_LINES, int COLUMN, int FIRST, int FIELDS>
void add_fields(const Halves<WORDS, PAIRS>& halves, int size,
                const Multipliers<WORDS, ROWS, PARTS>& multipliers, const Ahead& next,
                typename Shape<WORDS>::Sums* sums) {
  using S = Shape<WORDS>;
  using H = Halves<WORDS, PAIRS>;
  constexpr int PER_BYTE = H::FIELDS / 2;
  constexpr int PASS = S::PASSES == 1 || FIRST % 8 ? -1 : COLUMN * 2 + FIRST / 8;
  constexpr Words MASK = Words{} + ((0x10001u << H::BITS) - 0x10001u);
  Ints sum[ROWS][PARTS][FIELDS] = {};
  for (int step = 0; step * S::STEP < size; ++step) {
    if constexpr (PASS >= 0) {
#pragma GCC unroll 8
      for (int e = 0; e < S::STEP; ++e) next.fetch<WORDS, NEXT_LINES, PASS>(step * S::STEP + e);
    }
#pragma GCC unroll 16
    for (int i = 0; i < FIELDS; ++i) {
      const int place = (FIRST + i) % H::FIELDS;
      const Words half = halves.words[step][(FIRST + i) / H::FIELDS];
      const Words byte = place < PER_BYTE ? half : half >> 8;
      const Words code = byte & MASK << H::BITS * (place % PER_BYTE);
      const int g = H::field(FIRST + i) * WORDS / SCALE_GROUP;
#pragma GCC unroll 8
      for (int rp = 0; rp < ROWS * PARTS; ++rp) {
        auto& into = sum[rp / PARTS][rp % PARTS][i];
        into = dot(into, code, multipliers.at(rp / PARTS, rp % PARTS, step, g));
      }
    }
  }
  if constexpr (PASS >= 0)
    for (int e = (size + S::STEP - 1) / S::STEP * S::STEP; e < S::BLOCK; ++e)
      next.fetch<WORDS, NEXT_LINES, PASS>(e);
  for (int i = 0; i < FIELDS; ++i) {
    const int field = H::field(FIRST + i), g = field * WORDS / SCALE_GROUP;
    const float place = 1 / (float)(1 << (H::BITS * ((FIRST + i) % PER_BYTE)));
    constexpr float MIDDLE = 0.5f * ((1 << H::BITS) - 1);
    for (int r = 0; r < ROWS; ++r) {
      Floats total = to_floats(sum[r][0][i]);
      if constexpr (PARTS == 2) total += to_floats(sum[r][1][i]) * (1.0f / (1 << PART_BITS));
      const float offset = MIDDLE / S::CHANNELS * multipliers.total[r][g];
      float* at = sums[r][field] + COLUMN * LANES;
      store(at, load<Floats>(at) + (total * place - offset) * multipliers.unit[r][g]);
    }
  }
}

template <int WORDS, int ROWS, int PARTS, bool PAIRS, int NEXT_LINES, int COLUMN, int FIRST = 0>
void add_all_fields(const Halves<WORDS, PAIRS>& halves, int size,
                    const Multipliers<WORDS, ROWS, PARTS>& multipliers, const Ahead& next,
                    typename Shape<WORDS>::Sums* sums) {
  constexpr int FIELDS = std::min(SUMS_IN_REGISTERS / (ROWS * PARTS), 8);
  add_fields<WORDS, ROWS, PARTS, PAIRS, NEXT_LINES, COLUMN, FIRST, FIELDS>(halves, size, multipliers, next, sums);
  if constexpr (FIRST + FIELDS < FIELDS_PER_WORD)
    add_all_fields<WORDS, ROWS, PARTS, PAIRS, NEXT_LINES, COLUMN, FIRST + FIELDS>(halves, size, multipliers, next, sums);
}

template <int WORDS, int ROWS, int PARTS, bool PAIRS, int NEXT_LINES, int COLUMN = 0>
void add_columns(const Ahead& now, int size, const Multipliers<WORDS, ROWS, PARTS>& multipliers,
                 const Ahead& next, typename Shape<WORDS>::Sums* sums) {
  Halves<WORDS, PAIRS> halves;
  halves.template gather<NEXT_LINES>(now, size, COLUMN, next);
  add_all_fields<WORDS, ROWS, PARTS, PAIRS, NEXT_LINES, COLUMN>(halves, size, multipliers, next, sums);
  if constexpr (COLUMN + 1 < Shape<WORDS>::COLUMNS)
    add_columns<WORDS, ROWS, PARTS, PAIRS, NEXT_LINES, COLUMN + 1>(now, size, multipliers, next, sums);
}

// Adds a block of a list.
template <int WORDS, int ROWS, int PARTS, bool PAIRS, int NEXT_LINES>
void add_block(const Ahead& now, int size, const Ahead& next, int64_t first_row,
               typename Shape<WORDS>::Sums* sums) {
  Multipliers<WORDS, ROWS, PARTS> multipliers;
  multiply_scales(*now.list, now.first, size, first_row, now.scales, multipliers);
  add_columns<WORDS, ROWS, PARTS, PAIRS, NEXT_LINES>(now, size, multipliers, next, sums);
}

// All passes' shares at once.
template <int WORDS, int PASS = 0>
__attribute__((always_inline)) inline void fetch_all(const Ahead& pairs, int64_t entry) {
  pairs.fetch<WORDS, 2, PASS>(entry);
  if constexpr (PASS + 1 < Shape<WORDS>::PASSES) fetch_all<WORDS, PASS + 1>(pairs, entry);
}

// How many entries of `size` a block has: blocks are alike, so that none is too short to fetch the
// next one in its time.
template <int WORDS>
int64_t block_size(int64_t size) {
  using S = Shape<WORDS>;
  const int64_t blocks = (size + S::BLOCK - 1) / S::BLOCK;
  const int64_t each = blocks ? (size + blocks - 1) / blocks : 0;
  return (each + S::STEP - 1) / S::STEP * S::STEP;
}

template <int WORDS, int ROWS, int PARTS>
void add_products(const Call& call, const Unit& unit, bool fetched, const Unit* next_unit,
                  int64_t first_row, typename Shape<WORDS>::Sums* sums) {
  const auto start = [&](const Unit& of, bool pairs) {
    const List& list = pairs ? of.lists->pairs : of.lists->singles;
    return Ahead{&list, Unit::start(list, of.part, of.parts), of.lines(), of.scales(call.k)};
  };
  Ahead pairs = start(unit, true), singles = start(unit, false);
  const Ahead after = next_unit ? start(*next_unit, true) : singles;
  const int64_t last_pair = Unit::start(*pairs.list, unit.part + 1, unit.parts);
  const int64_t last_single = Unit::start(*singles.list, unit.part + 1, unit.parts);
  const int64_t pairs_at_once = block_size<WORDS>(last_pair - pairs.first);
  const int64_t singles_at_once = block_size<WORDS>(last_single - singles.first);
  if (!fetched)
    for (int e = 0; e < Shape<WORDS>::BLOCK; ++e) fetch_all<WORDS>(pairs, e);
  while (pairs.first < last_pair) {
    const int size = (int)std::min(pairs_at_once, last_pair - pairs.first);
    Ahead next = pairs;
    next.first += size;
    if (next.first < last_pair)
      add_block<WORDS, ROWS, PARTS, true, 2>(pairs, size, next, first_row, sums);
    else
      add_block<WORDS, ROWS, PARTS, true, 1>(pairs, size, singles, first_row, sums);
    pairs = next;
  }
  while (singles.first < last_single) {
    const int size = (int)std::min(singles_at_once, last_single - singles.first);
    Ahead next = singles;
    next.first += size;
    if (next.first < last_single)
      add_block<WORDS, ROWS, PARTS, false, 1>(singles, size, next, first_row, sums);
    else
      add_block<WORDS, ROWS, PARTS, false, 2>(singles, size, after, first_row, sums);
    singles = next;
  }
}

}  // namespace grinqh
