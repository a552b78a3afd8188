// grinqh::dequantize on CPUs, transposed: what it means is written down in ops/oracle.py.
#include <cmath>

#include "kernels.h"

namespace grinqh {
namespace {

constexpr int64_t CHANNELS_AT_ONCE = 64;

template <class Out>
Out rounded(float value) {
  return value;
}

template <>
Half rounded(float value) {  // rounding up must not turn its largest into infinity
  constexpr float LARGEST = 65504;
  return std::min(std::max(value, -LARGEST), LARGEST);
}

// One channel of one tile. row_scale: [tile]; lines: of its slices.
template <int WORDS, int SLICES, class Out>
void write_line(const uint32_t* const* lines, const uint8_t* scale_codes, const float* scale_of,
                const float* gains, const float* row_scale, Out* out) {
  constexpr int CODES = 1 << (2 * SLICES);
  const float gain = gains[SLICES - 1];
  for (int field = 0; field < FIELDS_PER_WORD; ++field) {
    const float scale = scale_of[scale_codes[field * WORDS / SCALE_GROUP]];
    for (int w = 0; w < WORDS; ++w) {
      uint32_t code = 0;
      for (int s = 0; s < SLICES; ++s) code = code << 2 | (lines[s][w] >> (2 * field) & 3);
      const float middle = (float)(int32_t)(2 * code + 1 - CODES) * (1.0f / CODES);
      out[field * WORDS + w] = rounded<Out>(gain * middle * scale * row_scale[field * WORDS + w]);
    }
  }
}

template <int WORDS, class Out>
void write_lines(int slices, const uint32_t* const* lines, const uint8_t* scale_codes,
                 const float* scale_of, const float* gains, const float* row_scale, Out* out) {
  auto* write = slices == 1   ? write_line<WORDS, 1, Out>
                : slices == 2 ? write_line<WORDS, 2, Out>
                : slices == 3 ? write_line<WORDS, 3, Out>
                              : write_line<WORDS, 4, Out>;
  write(lines, scale_codes, scale_of, gains, row_scale, out);
}

template <int WORDS, class Out>
void write_tiles(const Call& call, const Weight& weight, int64_t level, Out* out) {
  constexpr int TILE = WORDS * FIELDS_PER_WORD, GROUPS = TILE / SCALE_GROUP;
  const int64_t k = call.k, tiles = weight.tiles();
  const int64_t blocks = (k + CHANNELS_AT_ONCE - 1) / CHANNELS_AT_ONCE;
  const int high = call.high_lines(), low = call.low_lines();
  float scale_of[256] = {};
  for (int code = 1; code < 256; ++code) scale_of[code] = (float)std::exp2((code - 255) / 16.0);
#pragma omp parallel for num_threads((int)call.threads) schedule(dynamic, 4)
  for (int64_t unit = 0; unit < tiles * blocks; ++unit) {
    const int64_t t = unit / blocks, first = unit % blocks * CHANNELS_AT_ONCE;
    float row_scale[TILE] = {};
    for (int64_t i = 0; i < std::min<int64_t>(TILE, weight.n - t * TILE); ++i)
      row_scale[i] = weight.row_scale[t * TILE + i];
    const uint32_t* tile = weight.slices + t * weight.lines * WORDS;
    for (int64_t i = first; i < std::min(first + CHANNELS_AT_ONCE, k); ++i) {
      const int64_t place = weight.low ? weight.low[i] : i;
      const int slices = place < 0 ? std::min<int>(level / 2, high) : level / 2;
      const uint32_t* lines[4];
      for (int s = 0; s < slices; ++s)
        lines[s] = tile + (s < high ? i * high + s : k * high + place * low + s - high) * WORDS;
      write_lines<WORDS>(slices, lines, weight.scales + (t * k + i) * GROUPS, scale_of,
                         weight.gains, row_scale, out + (i * tiles + t) * TILE);
    }
  }
}

}  // namespace

void dequantize(const Call& call, const Weight& weight, int64_t level) {
  with_type(call.dtype, [&](auto zero) {
    auto* out = (decltype(zero)*)weight.out;
    switch (weight.words) {
      case 4: return write_tiles<4>(call, weight, level, out);
      case 8: return write_tiles<8>(call, weight, level, out);
      case 16: return write_tiles<16>(call, weight, level, out);
      default: return write_tiles<32>(call, weight, level, out);
    }
  });
}

}  // namespace grinqh
