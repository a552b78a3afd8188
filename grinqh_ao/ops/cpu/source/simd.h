// Vectors of the machine's width (SIMD), in GCC's and Clang's portable notation.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace grinqh {

#if defined(__AVX512BW__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// DotSums that fit into registers beside masks and operands.
#if defined(__AVX512BW__)
constexpr int SUMS_IN_REGISTERS = 16;
#else
constexpr int SUMS_IN_REGISTERS = 8;
#endif

using Floats = float __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));

template <class Vector>
inline Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <class Vector>
inline void store(void* to, Vector vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

inline Floats to_floats(Ints integers) { return __builtin_convertvector(integers, Floats); }

// LANES bytes, without a sign. (GCC converts vectors of bytes one by one.)
inline Ints from_bytes(const uint8_t* bytes) {
#if defined(__AVX512BW__)
  return (Ints)_mm512_cvtepu8_epi32(load<__m128i>(bytes));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes));
#else
  Ints integers;
  for (int lane = 0; lane < LANES; ++lane) integers[lane] = bytes[lane];
  return integers;
#endif
}

// Rounded to the nearest, ties to even. Values are not NaN.
inline void store_rounded(c10::BFloat16* to, Floats from) {
  const Words bits = (Words)from, rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
#if defined(__AVX512BW__)
  store(to, _mm512_cvtepi32_epi16((__m512i)rounded));
#elif defined(__AVX2__)
  const auto packed = _mm256_packus_epi32((__m256i)rounded, (__m256i)rounded);
  store(to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000)));
#elif defined(__aarch64__)
  store(to, vmovn_u32((uint32x4_t)rounded));
#else
  for (int lane = 0; lane < LANES; ++lane) to[lane].x = (uint16_t)rounded[lane];
#endif
}

// The same; the largest are not rounded to infinity.
inline void store_rounded(c10::Half* to, Floats from) {
  constexpr float MAX = 65504;
  from = from > MAX ? Floats{} + MAX : from;
  from = from < -MAX ? Floats{} - MAX : from;
#if defined(__AVX512BW__)
  store(to, _mm512_cvtps_ph((__m512)from, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
  store(to, _mm256_cvtps_ph((__m256)from, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  store(to, vcvt_f16_f32((float32x4_t)from));
#else
  for (int lane = 0; lane < LANES; ++lane) to[lane] = from[lane];
#endif
}

inline void store_rounded(float* to, Floats from) { store(to, from); }

inline Ints larger(Ints a, Ints b) { return b > a ? b : a; }
inline Floats magnitude(Floats a) { return (Floats)((Words)a & 0x7FFFFFFFu); }
// Of values that are not negative; they are in the order of their bits.
inline Floats larger_size(Floats a, Floats b) { return (Floats)larger((Ints)a, (Ints)b); }

inline Ints lane_numbers() {
  Ints numbers = {};
  for (int lane = 0; lane < LANES; ++lane) numbers[lane] = lane;
  return numbers;
}

// Lane i is vector[places[i] % LANES].
template <class Vector>
inline Vector permute(Vector vector, Ints places) {
#if defined(__AVX512BW__)
  return (Vector)_mm512_permutexvar_epi32((__m512i)places, (__m512i)vector);
#elif defined(__AVX2__)
  return (Vector)_mm256_permutevar8x32_epi32((__m256i)vector, (__m256i)places);
#else
  Vector out;
  for (int lane = 0; lane < LANES; ++lane) out[lane] = vector[places[lane] % LANES];
  return out;
#endif
}

// table[places[i] % 16] in lane i
inline Floats look_up(const float* table, Ints places) {
#if defined(__AVX512BW__)
  return permute(load<Floats>(table), places);
#elif defined(__AVX2__)
  const __m256 low = (__m256)permute(load<Floats>(table), places);
  const __m256 high = (__m256)permute(load<Floats>(table + 8), places);
  return (Floats)_mm256_blendv_ps(low, high, (__m256)(places << 28));
#else
  Floats out;
  for (int lane = 0; lane < LANES; ++lane) out[lane] = table[places[lane] & 15];
  return out;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512BW__)
// For each set of lanes, a bit a lane: its lanes one after the other, and then any.
struct LaneOrders {
  alignas(8) uint8_t of[1 << LANES][LANES] = {};
  constexpr LaneOrders() {
    for (int lanes = 0; lanes < 1 << LANES; ++lanes)
      for (int lane = 0, at = 0; lane < LANES; ++lane)
        if (lanes >> lane & 1) of[lanes][at++] = (uint8_t)lane;
  }
};
constexpr LaneOrders LANE_ORDERS;
#endif

// Some of a vector's lanes. To store them is to write them one after the other, and something
// behind them: up to LANES in all.
struct Chosen {
#if defined(__AVX512BW__)
  explicit Chosen(Ints lanes) : mask(_mm512_movepi32_mask((__m512i)lanes)) {}
  int count() const { return __builtin_popcount(mask); }
  template <class Vector>
  void store(void* to, Vector vector) const {
    grinqh::store(to, _mm512_maskz_compress_epi32(mask, (__m512i)vector));
  }
  __mmask16 mask;
#elif defined(__AVX2__)
  explicit Chosen(Ints lanes) : mask(_mm256_movemask_ps((__m256)lanes)) {}
  int count() const { return __builtin_popcount(mask); }
  template <class Vector>
  void store(void* to, Vector vector) const {
    grinqh::store(to, permute(vector, from_bytes(LANE_ORDERS.of[mask])));
  }
  int mask;
#else
  explicit Chosen(Ints lanes) : mask(lanes) {}
  int count() const {
    int count = 0;
    for (int lane = 0; lane < LANES; ++lane) count -= mask[lane];
    return count;
  }
  template <class Vector>
  void store(void* to, Vector vector) const {
    auto* at = (int32_t*)to;
    for (int lane = 0; lane < LANES; ++lane) {
      *at = ((Ints)vector)[lane];
      at -= mask[lane];
    }
  }
  Ints mask;  // of -1 and 0
#endif
};

// Each lane's sum of products of codes and multipliers, of both 16-bit halves. Codes are not
// negative.
struct DotSums {
#if defined(__aarch64__)
  // Of lanes 0 and 1, and 2 and 3, with each half's products in a place of their own.
  int32x4_t lower, upper;
  void add(Words codes, Ints multipliers) {
    const auto a = (int16x8_t)codes, b = (int16x8_t)multipliers;
    lower = vmlal_s16(lower, vget_low_s16(a), vget_low_s16(b));
    upper = vmlal_high_s16(upper, a, b);
  }
  Ints total() const { return (Ints)vpaddq_s32(lower, upper); }
#else
  Ints sum;
  void add(Words codes, Ints multipliers) {
#if defined(__AVX512VNNI__)
    sum = (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)codes, (__m512i)multipliers);
#elif defined(__AVX512BW__)
    sum += (Ints)_mm512_madd_epi16((__m512i)codes, (__m512i)multipliers);
#elif defined(__AVXVNNI__)
    sum = (Ints)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)codes, (__m256i)multipliers);
#elif defined(__AVX2__)
    sum += (Ints)_mm256_madd_epi16((__m256i)codes, (__m256i)multipliers);
#else
    sum += (Ints)(codes & 0xFFFFu) * ((multipliers << 16) >> 16) +
           (Ints)(codes >> 16) * (multipliers >> 16);
#endif
  }
  Ints total() const { return sum; }
#endif
};

// A vector of one line's words, or where lines are shorter of several channels' side by side.
template <int WORDS>
inline Words join(const uint32_t* const* lines) {
  if constexpr (WORDS >= LANES) return load<Words>(lines[0]);
#if defined(__AVX512BW__)
  if constexpr (WORDS == 4) {
    auto part = [&](int i) { return _mm_loadu_si128((const __m128i*)lines[i]); };
    __m512i all = _mm512_castsi128_si512(part(0));
    all = _mm512_inserti32x4(all, part(1), 1);
    all = _mm512_inserti32x4(all, part(2), 2);
    return (Words)_mm512_inserti32x4(all, part(3), 3);
  } else {
    auto part = [&](int i) { return _mm256_loadu_si256((const __m256i*)lines[i]); };
    return (Words)_mm512_inserti64x4(_mm512_castsi256_si512(part(0)), part(1), 1);
  }
#elif defined(__AVX2__)
  return (Words)_mm256_loadu2_m128i((const __m128i*)lines[1], (const __m128i*)lines[0]);
#else
  return load<Words>(lines[0]);
#endif
}

}  // namespace grinqh
