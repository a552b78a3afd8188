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

#include "lists.h"

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
  // Of a row. Where a vector holds several channels, the lanes of each have sums of their own.
  using Sums = float[FIELDS_PER_WORD][WORDS * CHANNELS];
};

// What a block of entries is multiplied with: integers in units of the largest of their group.
template <int WORDS, int ROWS, int PARTS>
struct Multipliers {
  using S = Shape<WORDS>;
  // [steps, groups] of one lane, or of a vector where that holds several channels
  static constexpr int INTS = S::CHANNELS > 1 ? LANES : 1;
  alignas(64) int32_t ints[ROWS][PARTS][BLOCK / S::STEP * S::GROUPS * INTS];
  float unit[ROWS][S::GROUPS];
  float total[ROWS][S::GROUPS];  // of a group's integers
};

// 2 ** ((code - 255) / 16), and 0 for code 0: codec.decode_scales.
inline Floats decode_scales(const uint8_t* codes) {
  Ints code;
  for (int i = 0; i < LANES; ++i) code[i] = codes[i];
  const Floats f = to_floats((code + 1) & 15) * (1.0f / 16);
  Floats power = f * 2.1232337e-4f + 1.2562437e-3f;  // 2 ** f, to half a unit in the last place
  power = power * f + 9.6669057e-3f;
  power = power * f + 5.5488668e-2f;
  power = power * f + 2.4022876e-1f;
  power = power * f + 6.9314706e-1f;
  power = power * f + 1.0f;
  const Ints octave = ((code + 1) >> 4) - 16;
  return (Floats)(((Ints)power + (octave << 23)) & (code > 0));
}

template <int WORDS, int ROWS, int PARTS>
void multiply_scales(const List& list, int64_t first, int size, int64_t first_row,
                     const uint8_t* scales, Multipliers<WORDS, ROWS, PARTS>& out) {
  using S = Shape<WORDS>;
  constexpr int G = S::GROUPS, C = S::CHANNELS;
  constexpr int PERIOD = std::max(G, LANES);  // of groups among vectors of [entry, group]
  constexpr float TOP = (1 << PART_BITS) - 1;
  constexpr float NOTHING = 1e-30f;  // beside the row's largest x, which is 1 or more
  constexpr float WHOLE = 3 << 22;   // added and subtracted, rounds to a whole number
  const int steps = (size + S::STEP - 1) / S::STEP;
  const int values = (steps * S::STEP * G + PERIOD - 1) / PERIOD * PERIOD;
  alignas(64) uint8_t codes[BLOCK * G];
  alignas(64) float scale[BLOCK * G], value[BLOCK * G];
  alignas(64) int32_t whole[PARTS][BLOCK * G];

  for (int e = 0; e < size; ++e)
    std::memcpy(codes + e * G, scales + (int64_t)list.entries[first + e].channel * G, G);
  std::memset(codes + size * G, 0, values - size * G);  // what fills a step up counts nothing
  for (int i = 0; i < values; i += LANES) store(scale + i, decode_scales(codes + i));

  for (int r = 0; r < ROWS; ++r) {
    const float* const x = list.values.data() + (first_row + r) * list.capacity + first;
    for (int e = 0; e < values / G; ++e)
      for (int g = 0; g < G; ++g) value[e * G + g] = x[e];
    alignas(64) float largest[PERIOD] = {}, inverse[PERIOD];
    for (int i = 0; i < values; i += PERIOD) {
      for (int p = 0; p < PERIOD; p += LANES) {
        const Floats v = load<Floats>(value + i + p) * load<Floats>(scale + i + p);
        store(value + i + p, v);
        store(largest + p, larger(load<Floats>(largest + p), (Floats)((Ints)v & 0x7FFFFFFF)));
      }
    }
    for (int half = PERIOD / 2; half >= G; half /= 2)
      for (int i = 0; i < half; ++i) largest[i] = std::max(largest[i], largest[i + half]);
    for (int g = 0; g < G; ++g) inverse[g] = largest[g] > NOTHING ? TOP / largest[g] : 0;
    for (int i = G; i < PERIOD; ++i) inverse[i] = inverse[i - G];

    alignas(64) float total[PARTS][PERIOD] = {};
    for (int i = 0; i < values; i += PERIOD) {
      for (int p = 0; p < PERIOD; p += LANES) {
        Floats rest = load<Floats>(value + i + p) * load<Floats>(inverse + p);
        for (int part = 0; part < PARTS; ++part) {
          const Floats rounded = (rest + WHOLE) - WHOLE;
          store(whole[part] + i + p, __builtin_convertvector(rounded, Ints));
          store(total[part] + p, load<Floats>(total[part] + p) + rounded);
          rest = (rest - rounded) * (float)(1 << PART_BITS);
        }
      }
    }
    for (int part = 0; part < PARTS; ++part)
      for (int i = G; i < PERIOD; ++i) total[part][i % G] += total[part][i];
    for (int g = 0; g < G; ++g) {
      out.unit[r][g] = largest[g] / TOP;
      out.total[r][g] = total[0][g] + (PARTS == 2 ? total[PARTS - 1][g] / (1 << PART_BITS) : 0);
    }
    for (int part = 0; part < PARTS; ++part) {
      for (int step = 0; step < steps; ++step) {
        for (int c = 0; c < C; ++c) {
          const int32_t* const low = whole[part] + (step * S::STEP + c) * G;
          const int32_t* const high = low + C * G;
          int32_t* const into = out.ints[r][part] + step * G * out.INTS + c * (C > 1 ? WORDS : 0);
          for (int g = 0; g < G; ++g)
            for (int w = 0; w < (C > 1 ? WORDS : 1); ++w)
              into[g * out.INTS + w] = (int32_t)((uint32_t)high[g] << 16) | (low[g] & 0xFFFF);
        }
      }
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

// Fetches one column's share of an entry's lines, and with the first its scales, into the
// second-level cache: the first-level one has too few places for misses.
template <int WORDS>
inline void prefetch(const uint32_t* tile, const uint8_t* scales, Entry entry, int column,
                     int bytes) {
  using S = Shape<WORDS>;
  const auto* line = (const char*)(tile + (int64_t)entry.line * WORDS);
  const int share = bytes / S::COLUMNS;
  for (int at = 0; at < share; at += 64) __builtin_prefetch(line + column * share + at, 0, 2);
  if (column == 0 && S::GROUPS > 1)
    __builtin_prefetch(scales + (int64_t)entry.channel * S::GROUPS, 0, 2);
}

// One column of a block's words, as they are multiplied. Fields are in the order in which they lie
// there: of singles 0, 1, .. 15, of pairs 0, 2, .. 14, 1, 3, .. 15.
template <int WORDS, bool PAIRS>
struct Halves {
  using S = Shape<WORDS>;
  static constexpr int BITS = PAIRS ? 4 : 2;
  static constexpr int VECTORS = PAIRS ? 4 : 2;
  static constexpr int FIELDS = FIELDS_PER_WORD / VECTORS;  // of a vector
  Words words[BLOCK / S::STEP][VECTORS];

  static constexpr int field(int i) { return PAIRS ? i % 8 * 2 + i / 8 : i; }

  // On the way a part of the next block's lines is fetched: `next` of them.
  void gather(const Entry* entries, int size, const uint32_t* tile, const uint8_t* scales,
              int column, const Entry* next, int next_bytes) {
    for (int step = 0; step * S::STEP < size; ++step) {
      const uint32_t* lines[S::STEP];
      for (int c = 0; c < S::STEP; ++c) {
        const int e = step * S::STEP + c;
        lines[c] = tile + (int64_t)entries[e].line * WORDS + column * LANES;
        prefetch<WORDS>(tile, scales, next[e], column, next_bytes);
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
  }
};

// Adds FIELDS of each word from FIRST on to sums [ROWS][fields][words], in lanes as they come.
template <int WORDS, int ROWS, int PARTS, bool PAIRS, int FIRST, int FIELDS>
void add_fields(const Halves<WORDS, PAIRS>& halves, int size,
                const Multipliers<WORDS, ROWS, PARTS>& multipliers, int column,
                typename Shape<WORDS>::Sums* sums) {
  using S = Shape<WORDS>;
  using H = Halves<WORDS, PAIRS>;
  constexpr int G = S::GROUPS, INTS = multipliers.INTS, PER_BYTE = H::FIELDS / 2;
  constexpr Words MASK = Words{} + ((0x10001u << H::BITS) - 0x10001u);
  Ints sum[ROWS][PARTS][FIELDS] = {};
  for (int step = 0; step * S::STEP < size; ++step) {
#pragma GCC unroll 16
    for (int i = 0; i < FIELDS; ++i) {
      const int place = (FIRST + i) % H::FIELDS;
      const Words half = halves.words[step][(FIRST + i) / H::FIELDS];
      const Words byte = place < PER_BYTE ? half : half >> 8;
      const Words code = byte & MASK << H::BITS * (place % PER_BYTE);
      const int g = H::field(FIRST + i) * WORDS / SCALE_GROUP;
#pragma GCC unroll 8
      for (int rp = 0; rp < ROWS * PARTS; ++rp) {
        const int32_t* const ints = multipliers.ints[rp / PARTS][rp % PARTS] + (step * G + g) * INTS;
        auto& into = sum[rp / PARTS][rp % PARTS][i];
        into = dot(into, code, INTS == 1 ? Ints{} + *ints : load<Ints>(ints));
      }
    }
  }
  for (int i = 0; i < FIELDS; ++i) {
    const int field = H::field(FIRST + i), g = field * WORDS / SCALE_GROUP;
    const float place = 1 / (float)(1 << (H::BITS * ((FIRST + i) % PER_BYTE)));
    constexpr float MIDDLE = 0.5f * ((1 << H::BITS) - 1);
    for (int r = 0; r < ROWS; ++r) {
      Floats total = to_floats(sum[r][0][i]);
      if constexpr (PARTS == 2) total += to_floats(sum[r][1][i]) * (1.0f / (1 << PART_BITS));
      const float offset = MIDDLE / S::CHANNELS * multipliers.total[r][g];
      float* at = sums[r][field] + column * LANES;
      store(at, load<Floats>(at) + (total * place - offset) * multipliers.unit[r][g]);
    }
  }
}

template <int WORDS, int ROWS, int PARTS, bool PAIRS, int FIRST = 0>
void add_all_fields(const Halves<WORDS, PAIRS>& halves, int size,
                    const Multipliers<WORDS, ROWS, PARTS>& multipliers, int column,
                    typename Shape<WORDS>::Sums* sums) {
  constexpr int FIELDS = std::min(SUMS_IN_REGISTERS / (ROWS * PARTS), 8);
  add_fields<WORDS, ROWS, PARTS, PAIRS, FIRST, FIELDS>(halves, size, multipliers, column, sums);
  if constexpr (FIRST + FIELDS < FIELDS_PER_WORD)
    add_all_fields<WORDS, ROWS, PARTS, PAIRS, FIRST + FIELDS>(halves, size, multipliers, column, sums);
}

// Adds a block of a list; `next` are the entries of the one that follows.
template <int WORDS, int ROWS, int PARTS, bool PAIRS>
void add_block(const List& list, int64_t first, int size, const Entry* next, int next_bytes,
               int64_t first_row, const uint32_t* tile, const uint8_t* scales,
               typename Shape<WORDS>::Sums* sums) {
  Multipliers<WORDS, ROWS, PARTS> multipliers;
  Halves<WORDS, PAIRS> halves;
  multiply_scales(list, first, size, first_row, scales, multipliers);
  for (int column = 0; column < Shape<WORDS>::COLUMNS; ++column) {
    halves.gather(list.entries.data() + first, size, tile, scales, column, next, next_bytes);
    add_all_fields(halves, size, multipliers, column, sums);
  }
}

// Adds one of `parts` equal parts of both lists.
template <int WORDS, int ROWS, int PARTS>
void add_products(const Lists& lists, int64_t part, int64_t parts, int64_t first_row,
                  const uint32_t* tile, const uint8_t* scales, typename Shape<WORDS>::Sums* sums) {
  constexpr int LINE = 4 * WORDS;  // bytes
  const List &pairs = lists.pairs, &singles = lists.singles;
  int64_t pair = pairs.size * part / parts, single = singles.size * part / parts;
  const int64_t last_pair = pairs.size * (part + 1) / parts;
  const int64_t last_single = singles.size * (part + 1) / parts;
  const Entry* const first_singles = singles.entries.data() + single;
  for (int e = 0; e < BLOCK; ++e)
    for (int column = 0; column < Shape<WORDS>::COLUMNS; ++column)
      prefetch<WORDS>(tile, scales, pairs.entries[pair + e], column, 2 * LINE);
  while (pair < last_pair) {
    const int size = (int)std::min<int64_t>(BLOCK, last_pair - pair);
    const bool more = pair + size < last_pair;
    const Entry* next = more ? pairs.entries.data() + pair + size : first_singles;
    add_block<WORDS, ROWS, PARTS, true>(pairs, pair, size, next, more ? 2 * LINE : LINE, first_row,
                                        tile, scales, sums);
    pair += size;
  }
  while (single < last_single) {
    const int size = (int)std::min<int64_t>(BLOCK, last_single - single);
    const Entry* next = singles.entries.data() + single + size;
    add_block<WORDS, ROWS, PARTS, false>(singles, single, size, next, LINE, first_row, tile, scales,
                                         sums);
    single += size;
  }
}

}  // namespace grinqh
