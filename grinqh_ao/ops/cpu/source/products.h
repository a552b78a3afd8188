// Lines of 2-bit fields times activations: the loops that all the time goes into.
//
// Two channels lie in the two halves of a vector's 32-bit lanes, and one instruction multiplies
// both with integers of 16 bits and adds both products to a sum. A field is masked out where it
// stands; each of a word's fields has sums of its own in registers. So 32 weights take one logic
// instruction and one multiply-add. The two slices of a pair are merged into nibbles first.
#pragma once

#include "multipliers.h"
#include "tile.h"

namespace grinqh {

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

  template <int WORDS>
  const uint32_t* line(int64_t entry) const {
    return tile + (int64_t)list->lines[first + entry] * WORDS;
  }

  // Fetches one pass's share of an entry's lines, and with the first its scales, into the
  // second-level cache. Cores can wait for only so many lines at a time, and stop when they want
  // more; so fetching is spread evenly over the work. (GCC takes what only prefetches for a
  // function without effects, and leaves it out if it is not inlined early.)
  template <int WORDS, int LINES, int PASS>
  __attribute__((always_inline)) void fetch(int64_t entry) const {
    constexpr int BYTES = 4 * WORDS * LINES, PASSES = Shape<WORDS>::PASSES;
    const auto* from = (const char*)line<WORDS>(entry);
#pragma GCC unroll 8
    for (int at = 0; at < BYTES; at += 64)
      if (at * PASSES / BYTES == PASS) __builtin_prefetch(from + at, 0, 2);
    constexpr int GROUPS = Shape<WORDS>::GROUPS;
    if (PASS == 0 && GROUPS > 1)
      __builtin_prefetch(scales + (int64_t)list->channels[first + entry] * GROUPS, 0, 2);
  }

  // All passes' shares at once.
  template <int WORDS, int LINES, int PASS = 0>
  __attribute__((always_inline)) void fetch_all(int64_t entry) const {
    fetch<WORDS, LINES, PASS>(entry);
    if constexpr (PASS + 1 < Shape<WORDS>::PASSES) fetch_all<WORDS, LINES, PASS + 1>(entry);
  }
};

// Some entries of a list times x. On the way the lines of the block that comes `next` are fetched,
// NEXT_LINES of each entry.
template <int WORDS, int ROWS, int PARTS, bool PAIRS, int NEXT_LINES>
class Block {
  using S = Shape<WORDS>;

 public:
  Block(const Ahead& now, int size, const Ahead& next, int64_t first_row)
      : now(now), size(size), next(next) {
    multiply_scales(*now.list, now.first, size, first_row, now.scales, multipliers);
  }

  // To sums [ROWS][fields][words], in lanes as they come.
  template <int COLUMN = 0>
  void add(typename S::Sums* sums) {
    gather(COLUMN);
    add_fields_from<COLUMN, 0>(sums);
    if constexpr (COLUMN + 1 < S::COLUMNS) add<COLUMN + 1>(sums);
  }

 private:
  static constexpr int BITS = PAIRS ? 4 : 2;
  static constexpr int VECTORS = PAIRS ? 4 : 2;  // of a step
  static constexpr int FIELDS = FIELDS_PER_WORD / VECTORS;  // of a vector's lanes' halves
  static constexpr int AT_ONCE = std::min(SUMS_IN_REGISTERS / (ROWS * PARTS), 8);

  const Ahead now;
  const int size;
  const Ahead next;
  Multipliers<WORDS, ROWS, PARTS> multipliers;
  Words words[S::BLOCK / S::STEP][VECTORS];  // of one column, as they are multiplied

  // Fields in the order in which they lie there: of singles 0, 1, .. 15, of pairs 0, 2, .. 14, 1,
  // 3, .. 15.
  static constexpr int field(int i) { return PAIRS ? i % 8 * 2 + i / 8 : i; }

  void gather(int column) {
    const int half = half_of<WORDS>(size);
    for (int step = 0; step * S::STEP < size; ++step) {
      const uint32_t* lines[S::STEP];
      for (int c = 0; c < S::STEP; ++c) {
        const int entry = step * S::CHANNELS + c % S::CHANNELS + (c < S::CHANNELS ? 0 : half);
        lines[c] = now.line<WORDS>(entry) + column * LANES;
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

  template <int COLUMN, int FIRST>
  void add_fields_from(typename S::Sums* sums) const {
    constexpr bool FETCHES = S::PASSES > 1 && FIRST % 8 == 0;
    add_fields<COLUMN, FIRST, FETCHES ? COLUMN * 2 + FIRST / 8 : -1>(sums);
    if constexpr (FIRST + AT_ONCE < FIELDS_PER_WORD)
      add_fields_from<COLUMN, FIRST + AT_ONCE>(sums);
  }

  // AT_ONCE fields of each word, from FIRST on.
  template <int COLUMN, int FIRST, int PASS>
  void add_fields(typename S::Sums* sums) const {
    constexpr int PER_BYTE = FIELDS / 2;
    constexpr Words MASK = Words{} + ((0x10001u << BITS) - 0x10001u);
    DotSums sum[ROWS][PARTS][AT_ONCE] = {};
    int step = 0;
    for (; step * S::STEP < size; ++step) {
      if constexpr (PASS >= 0)
        for (int e = 0; e < S::STEP; ++e) next.fetch<WORDS, NEXT_LINES, PASS>(step * S::STEP + e);
#pragma GCC unroll 16
      for (int i = 0; i < AT_ONCE; ++i) {
        const int place = (FIRST + i) % FIELDS, g = field(FIRST + i) * WORDS / SCALE_GROUP;
        const Words half = words[step][(FIRST + i) / FIELDS];
        const Words byte = place < PER_BYTE ? half : half >> 8;
        const Words code = byte & MASK << BITS * (place % PER_BYTE);
#pragma GCC unroll 8
        for (int rp = 0; rp < ROWS * PARTS; ++rp) {
          const int r = rp / PARTS, part = rp % PARTS;
          sum[r][part][i].add(code, multipliers.at(r, part, step, g));
        }
      }
    }
    if constexpr (PASS >= 0)
      for (int e = step * S::STEP; e < S::BLOCK; ++e) next.fetch<WORDS, NEXT_LINES, PASS>(e);
    for (int i = 0; i < AT_ONCE; ++i) {
      const int at = field(FIRST + i), g = at * WORDS / SCALE_GROUP;
      const float place = 1 / (float)(1 << (BITS * ((FIRST + i) % PER_BYTE)));
      constexpr float MIDDLE = 0.5f * ((1 << BITS) - 1);
      for (int r = 0; r < ROWS; ++r) {
        Floats total = to_floats(sum[r][0][i].total());
        if constexpr (PARTS == 2)
          total += to_floats(sum[r][1][i].total()) * (1.0f / (1 << PART_BITS));
        const float offset = MIDDLE / S::CHANNELS * multipliers.total[r][g];
        float* into = sums[r][at] + COLUMN * LANES;
        store(into, load<Floats>(into) + (total * place - offset) * multipliers.unit[r][g]);
      }
    }
  }
};

// How many of `size` entries a block has: blocks are alike, so that none is too short to fetch the
// next one in its time.
template <int WORDS>
int64_t block_size(int64_t size) {
  using S = Shape<WORDS>;
  const int64_t blocks = std::max<int64_t>(1, (size + S::BLOCK - 1) / S::BLOCK);
  const int64_t each = (size + blocks - 1) / blocks;
  return (each + S::STEP - 1) / S::STEP * S::STEP;
}

// The entries of one list up to `last`; those that come `after` it are of the other list.
template <int WORDS, int ROWS, int PARTS, bool PAIRS>
void add_list(Ahead now, int64_t last, const Ahead& after, int64_t first_row,
              typename Shape<WORDS>::Sums* sums) {
  constexpr int LINES = PAIRS ? 2 : 1, LINES_AFTER = PAIRS ? 1 : 2;
  const int64_t at_once = block_size<WORDS>(last - now.first);
  while (now.first < last) {
    const int size = (int)std::min(at_once, last - now.first);
    Ahead next = now;
    next.first += size;
    if (next.first < last)
      Block<WORDS, ROWS, PARTS, PAIRS, LINES>(now, size, next, first_row).add(sums);
    else
      Block<WORDS, ROWS, PARTS, PAIRS, LINES_AFTER>(now, size, after, first_row).add(sums);
    now = next;
  }
}

// A unit's pairs, then its singles.
template <int WORDS, int ROWS, int PARTS>
void add_products(const Call& call, const Unit& unit, bool fetched, const Unit* next_unit,
                  int64_t first_row, typename Shape<WORDS>::Sums* sums) {
  const auto start = [&](const Unit& of, const List& list) {
    return Ahead{&list, of.start(list), of.lines(), of.scales(call.k)};
  };
  const Ahead pairs = start(unit, unit.lists->pairs), singles = start(unit, unit.lists->singles);
  const Ahead after = next_unit ? start(*next_unit, next_unit->lists->pairs) : singles;
  if (!fetched)
    for (int e = 0; e < Shape<WORDS>::BLOCK; ++e) pairs.fetch_all<WORDS, 2>(e);
  add_list<WORDS, ROWS, PARTS, true>(pairs, unit.end(*pairs.list), singles, first_row, sums);
  add_list<WORDS, ROWS, PARTS, false>(singles, unit.end(*singles.list), after, first_row, sums);
}

}  // namespace grinqh
