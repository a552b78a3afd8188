// grinqh::dequantize on CPUs, in either order; what it means is written down in ops/oracle.py.
#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace grinqh {
namespace {

constexpr int64_t CHANNELS_AT_ONCE = 64;

// One channel of one tile. lines: of its slices; row_scale and out: [tile].
template <int WORDS, int SLICES, class Out>
void write_line(const uint32_t* const* lines, const uint8_t* scale_codes, const float* scale_of,
                const float* gains, const float* row_scale, Out* out) {
  // A vector has words of one field; of several, where lines are shorter than that.
  constexpr int FIELDS = std::max(1, LANES / WORDS);
  constexpr int CODES = 1 << (2 * SLICES);
  const float gain = gains[SLICES - 1];
  for (int column = 0; column < WORDS; column += LANES) {
    Words words[SLICES];
    for (int s = 0; s < SLICES; ++s) {
      const uint32_t* same[FIELDS];
      std::fill_n(same, FIELDS, lines[s] + column);
      words[s] = join<WORDS>(same);
    }
#pragma GCC unroll 16
    for (int field = 0; field < FIELDS_PER_WORD; field += FIELDS) {
      const int first = field * WORDS + column;
      const Words place = (Words)(FIELDS == 1 ? Ints{} : lane_numbers() / WORDS * 2) + 2 * field;
      Words code = {};
      for (int s = 0; s < SLICES; ++s) code = code << 2 | (words[s] >> place & 3u);
      const Floats middle = to_floats((Ints)(2 * code) + (1 - CODES)) * (1.0f / CODES);
      const float scale = scale_of[scale_codes[first / SCALE_GROUP]];
      store_rounded(out + first, gain * middle * scale * load<Floats>(row_scale + first));
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

// Channels of one tile [CHANNELS_AT_ONCE, outputs], `stride` apart -> out [outputs, channels], k
// apart.
template <class Out>
void write_transposed(const float* from, int64_t stride, int64_t channels, int64_t outputs,
                      int64_t k, Out* out) {
  for (int64_t n = 0; n < outputs; ++n) {
    float row[CHANNELS_AT_ONCE];
    Out rounded[CHANNELS_AT_ONCE];
    for (int i = 0; i < CHANNELS_AT_ONCE; ++i) row[i] = from[i * stride + n];
    for (int i = 0; i < CHANNELS_AT_ONCE; i += LANES)
      store_rounded(rounded + i, load<Floats>(row + i));
    std::copy_n(rounded, channels, out + n * k);
  }
}

template <int WORDS, class Out>
void write_tiles(const Call& call, const Weight& weight, int64_t level, bool transposed,
                 Out* out) {
  constexpr int TILE = WORDS * FIELDS_PER_WORD, GROUPS = TILE / SCALE_GROUP;
  constexpr int STRIDE = TILE + 16;  // of a power of two, all channels would share cache sets
  const int64_t k = call.k, tiles = weight.tiles();
  const int64_t blocks = (k + CHANNELS_AT_ONCE - 1) / CHANNELS_AT_ONCE;
  const int high = call.high_lines(), low = call.low_lines();
  float scale_of[256] = {};
  for (int code = 1; code < 256; ++code) scale_of[code] = (float)std::exp2((code - 255) / 16.0);
#pragma omp parallel for num_threads((int)call.threads) schedule(dynamic, 4)
  for (int64_t unit = 0; unit < tiles * blocks; ++unit) {
    const int64_t t = unit / blocks, first = unit % blocks * CHANNELS_AT_ONCE;
    const int64_t outputs = std::min<int64_t>(TILE, weight.n - t * TILE);
    const int64_t channels = std::min(CHANNELS_AT_ONCE, k - first);
    float row_scale[TILE] = {};
    std::copy_n(weight.row_scale + t * TILE, outputs, row_scale);
    const uint32_t* tile = weight.slices + t * weight.lines * WORDS;
    float kept[CHANNELS_AT_ONCE * STRIDE];
    if (!transposed)
      std::fill_n(kept + channels * STRIDE, (CHANNELS_AT_ONCE - channels) * STRIDE, 0.0f);
    for (int64_t i = first; i < first + channels; ++i) {
      const int64_t place = weight.low ? weight.low[i] : i;
      const int slices = place < 0 ? std::min<int>(level / 2, high) : level / 2;
      const uint32_t* lines[4];
      for (int s = 0; s < slices; ++s)
        lines[s] = tile + (s < high ? i * high + s : k * high + place * low + s - high) * WORDS;
      const auto write = [&](auto* to) {
        write_lines<WORDS>(slices, lines, weight.scales + (t * k + i) * GROUPS, scale_of,
                           weight.gains, row_scale, to);
      };
      if (transposed)
        write(out + (i * tiles + t) * TILE);
      else
        write(kept + (i - first) * STRIDE);
    }
    if (!transposed)
      write_transposed(kept, STRIDE, channels, outputs, k, out + t * TILE * k + first);
  }
}

}  // namespace

void dequantize(const Call& call, const Weight& weight, int64_t level, bool transposed) {
  with_type(call.dtype, [&](auto zero) {
    auto* out = (decltype(zero)*)weight.out;
    switch (weight.words) {
      case 4: return write_tiles<4>(call, weight, level, transposed, out);
      case 8: return write_tiles<8>(call, weight, level, transposed, out);
      case 16: return write_tiles<16>(call, weight, level, transposed, out);
      default: return write_tiles<32>(call, weight, level, transposed, out);
    }
  });
}

}  // namespace grinqh
