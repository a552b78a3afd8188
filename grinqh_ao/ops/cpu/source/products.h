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
  int lines;  // of an entry
  int64_t first;
  const uint32_t* tile;
  const uint8_t* scales;

  template <int WORDS>
  const uint32_t* line(int64_t entry) const {
    return tile + (int64_t)list->lines[first + entry] * WORDS;
  }

  // Of an entry's bytes.
  template <int WORDS>
  int bytes() const {
    return 4 * WORDS * lines;
  }

  // As if lines began there.
  Ahead from(int byte) const {
    Ahead moved = *this;
    moved.tile += byte / 4;
    return moved;
  }

  // Fetches some of an entry's bytes, or also its scales, into the second-level cache. (GCC takes
  // what only prefetches for a function without effects, and leaves it out if it is not inlined
  // early.)
  template <int WORDS, bool SCALES>
  __attribute__((always_inline)) void fetch(int64_t entry) const {
    __builtin_prefetch(line<WORDS>(entry), 0, 2);
    constexpr int GROUPS = Shape<WORDS>::GROUPS;
    if (SCALES && GROUPS > 1)
      __builtin_prefetch(scales + (int64_t)list->channels[first + entry] * GROUPS, 0, 2);
  }
};

constexpr int FETCHED_AT_ONCE = 64;  // bytes

// What is fetched of an entry while some of the fields are multiplied. Cores can wait for only so
// many lines at a time, and stop when they want more; so fetching is spread evenly over the work.
enum class Fetch { NOTHING, SOME, FIRST };  // with the first bytes, scales

// Some entries of a list times x. On the way those of the block that comes `next` are fetched.
template <int WORDS, int ROWS, int PARTS, bool PAIRS>
class Block {
  using S = Shape<WORDS>;

 public:
  Block(const Ahead& now, int size, const Ahead& next, int64_t first_row)
      : now(now), size(size), next(next) {
    multiply_scales(*now.list, now.first, size, first_row, now.scales, multipliers);
  }

  // To sums [ROWS][fields][words], in lanes as they come.
  void add(typename S::Sums* sums) {
    for (int column = 0; column < S::COLUMNS; ++column) {
      gather(column);
      add_fields_from<0>(column, sums);
    }
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
        if constexpr (S::PASSES == 1) next.fetch<WORDS, true>(entry);
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
      for (int e = 2 * half; e < S::BLOCK; ++e) next.fetch<WORDS, true>(e);
  }

  template <int FIRST>
  void add_fields_from(int column, typename S::Sums* sums) const {
    const int pass = 2 * column + FIRST / 8, byte = pass * next.bytes<WORDS>() / S::PASSES;
    if (S::PASSES == 1 || FIRST % 8 || byte % FETCHED_AT_ONCE)
      add_fields<FIRST, Fetch::NOTHING>(column, next, sums);
    else if (FIRST || column)
      add_fields<FIRST, Fetch::SOME>(column, next.from(byte), sums);
    else
      add_fields<FIRST, Fetch::FIRST>(column, next, sums);
    if constexpr (FIRST + AT_ONCE < FIELDS_PER_WORD) add_fields_from<FIRST + AT_ONCE>(column, sums);
  }

  // AT_ONCE fields of each word, from FIRST on.
  template <int FIRST, Fetch FETCH>
  void add_fields(int column, const Ahead& fetched, typename S::Sums* sums) const {
    constexpr int PER_BYTE = FIELDS / 2;
    constexpr bool SCALES = FETCH == Fetch::FIRST;
    constexpr Words MASK = Words{} + ((0x10001u << BITS) - 0x10001u);
    DotSums sum[ROWS][PARTS][AT_ONCE] = {};
    int step = 0;
    for (; step * S::STEP < size; ++step) {
      if constexpr (FETCH != Fetch::NOTHING)
        for (int e = 0; e < S::STEP; ++e) fetched.fetch<WORDS, SCALES>(step * S::STEP + e);
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
    if constexpr (FETCH != Fetch::NOTHING)
      for (int e = step * S::STEP; e < S::BLOCK; ++e) fetched.fetch<WORDS, SCALES>(e);
    for (int i = 0; i < AT_ONCE; ++i) {
      const int at = field(FIRST + i), g = at * WORDS / SCALE_GROUP;
      const float place = 1 / (float)(1 << (BITS * ((FIRST + i) % PER_BYTE)));
      constexpr float MIDDLE = 0.5f * ((1 << BITS) - 1);
      for (int r = 0; r < ROWS; ++r) {
        Floats total = to_floats(sum[r][0][i].total());
        if constexpr (PARTS == 2)
          total += to_floats(sum[r][1][i].total()) * (1.0f / (1 << PART_BITS));
        const float offset = MIDDLE / S::CHANNELS * multipliers.total[r][g];
        float* into = sums[r][at] + column * LANES;
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
  const int64_t at_once = block_size<WORDS>(last - now.first);
  while (now.first < last) {
    const int size = (int)std::min(at_once, last - now.first);
    Ahead next = now;
    next.first += size;
    Block<WORDS, ROWS, PARTS, PAIRS>(now, size, next.first < last ? next : after, first_row)
        .add(sums);
    now = next;
  }
}

// A unit's pairs, then its singles.
template <int WORDS, int ROWS, int PARTS>
void add_products(const Call& call, const Unit& unit, bool fetched, const Unit* next_unit,
                  int64_t first_row, typename Shape<WORDS>::Sums* sums) {
  const auto start = [&](const Unit& of, const List& list, int lines) {
    return Ahead{&list, lines, of.start(list), of.lines(), of.scales(call.k)};
  };
  const Ahead pairs = start(unit, unit.lists->pairs, 2);
  const Ahead singles = start(unit, unit.lists->singles, 1);
  const Ahead after = next_unit ? start(*next_unit, next_unit->lists->pairs, 2) : singles;
  if (!fetched) {
    for (int e = 0; e < Shape<WORDS>::BLOCK; ++e) {
      pairs.fetch<WORDS, true>(e);
      for (int byte = FETCHED_AT_ONCE; byte < pairs.bytes<WORDS>(); byte += FETCHED_AT_ONCE)
        pairs.from(byte).fetch<WORDS, false>(e);
    }
  }
  add_list<WORDS, ROWS, PARTS, true>(pairs, unit.end(*pairs.list), singles, first_row, sums);
  add_list<WORDS, ROWS, PARTS, false>(singles, unit.end(*singles.list), after, first_row, sums);
}

}  // namespace grinqh
