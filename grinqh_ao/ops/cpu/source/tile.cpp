// LINE_WORDS is defined by whoever compiles this.
#include "tile.h"

#include "products.h"

namespace grinqh {
namespace {

constexpr int WORDS = LINE_WORDS;

template <int ROWS, int PARTS>
void add_rows(const Call& call, const Weight& weight, const Lists& lists, int64_t t, int64_t part,
              int64_t parts, int64_t first_row, float* out) {
  using S = Shape<WORDS>;
  const uint32_t* tile = weight.slices + t * weight.lines * WORDS;
  const uint8_t* scales = weight.scales + t * call.k * S::GROUPS;
  alignas(64) typename S::Sums sums[ROWS] = {};
  add_products<WORDS, ROWS, PARTS>(lists, part, parts, first_row, tile, scales, sums);
  for (int r = 0; r < ROWS; ++r) {
    for (int n = 0; n < S::TILE; ++n) {
      float total = 0;
      for (int c = 0; c < S::CHANNELS; ++c) total += sums[r][n / WORDS][c * WORDS + n % WORDS];
      out[r * S::TILE + n] = total;
    }
  }
}

template <int PARTS>
void add_all_rows(const Call& call, const Weight& weight, const Lists& lists, int64_t t,
                  int64_t part, int64_t parts, float* out) {
  for (int64_t row = 0; row < call.rows; row += ROWS_AT_ONCE) {
    const int64_t left = call.rows - row;
    auto* add = left == 1 ? add_rows<1, PARTS> : left == 2 ? add_rows<2, PARTS> : add_rows<4, PARTS>;
    add(call, weight, lists, t, part, parts, row, out + row * weight.tile());
  }
}

}  // namespace

#define NAME_OF(words) NAME_WITH(words)
#define NAME_WITH(words) add_tile_##words
void NAME_OF(LINE_WORDS)(const Call& call, const Weight& weight, const Lists& lists, int64_t tile,
                    int64_t part, int64_t parts, float* out) {
  auto* add = call.dtype == Dtype::BFLOAT16 ? add_all_rows<1> : add_all_rows<2>;
  add(call, weight, lists, tile, part, parts, out);
}

}  // namespace grinqh
