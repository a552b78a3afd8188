// Vectors of the machine's width, in GCC's and Clang's portable notation.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace grinqh {

#if defined(__AVX512BW__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// Sums that fit into registers beside masks and operands.
#if defined(__AVX512BW__) || defined(__aarch64__)
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

inline Floats larger(Floats a, Floats b) { return b > a ? b : a; }

// Adds to each sum the products of both 16-bit halves. Those of codes are not negative.
inline Ints dot(Ints sum, Words codes, Ints multipliers) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)codes, (__m512i)multipliers);
#elif defined(__AVX512BW__)
  return sum + (Ints)_mm512_madd_epi16((__m512i)codes, (__m512i)multipliers);
#elif defined(__AVX2__)
  return sum + (Ints)_mm256_madd_epi16((__m256i)codes, (__m256i)multipliers);
#else
  return sum + (Ints)(codes & 0xFFFFu) * ((multipliers << 16) >> 16) +
         (Ints)(codes >> 16) * (multipliers >> 16);
#endif
}

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
