// LINE_WORDS is defined by whoever compiles this.
#include "tile.h"

#include "products.h"

namespace grinqh {
namespace {

constexpr int WORDS = LINE_WORDS;
constexpr int ROWS_AT_ONCE = 4;

template <int ROWS, int PARTS>
void add_rows(const Call& call, const Unit& unit, bool fetched, const Unit* next, int64_t first_row,
              float* out) {
  using S = Shape<WORDS>;
  alignas(64) typename S::Sums sums[ROWS] = {};
  add_products<WORDS, ROWS, PARTS>(call, unit, fetched, next, first_row, sums);
  std::fill_n(out, ROWS * S::TILE, 0.0f);
  for (int r = 0; r < ROWS; ++r)
    for (int field = 0; field < FIELDS_PER_WORD; ++field)
      for (int c = 0; c < S::CHANNELS; ++c)
        for (int w = 0; w < WORDS; ++w)
          out[r * S::TILE + field * WORDS + w] += sums[r][field][c * WORDS + w];
}

template <int PARTS>
void add_all_rows(const Call& call, const Unit& unit, bool fetched, const Unit* next, float* out) {
  for (int64_t row = 0; row < call.rows; row += ROWS_AT_ONCE) {
    const int64_t left = call.rows - row;
    auto* add = left == 1   ? add_rows<1, PARTS>
                : left == 2 ? add_rows<2, PARTS>
                            : add_rows<4, PARTS>;
    add(call, unit, fetched || row > 0, next, row, out + row * unit.weight->tile());
  }
}

}  // namespace

#define NAME_OF(words) NAME_WITH(words)
#define NAME_WITH(words) add_tile_##words
void NAME_OF(LINE_WORDS)(const Call& call, const Unit& unit, bool fetched, const Unit* next,
                         float* out) {
  auto* add = call.dtype == Dtype::BFLOAT16 ? add_all_rows<1> : add_all_rows<2>;
  add(call, unit, fetched, next, out);
}

}  // namespace grinqh
