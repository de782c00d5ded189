// AVX2, FMA and F16C: 8 floats; codes of 4 bits are looked up byte by byte of their levels.
#pragma once

#include <immintrin.h>

#define LEANKV_ISA avx2
#define LEANKV_WIDTH 8
#include "simd_common.h"

namespace leankv::avx2 {

constexpr int kAccumulators = 8;  // of 16 registers

LEANKV_INLINE vu merge(vu low, vu high, uint32_t mask) { return (low & ~mask) | (high & mask); }

template <int B>
struct Lookup {  // of one vector of codes; at 4 bits in two registers and a blend
  static constexpr LevelTable<B, 16> table{};
  const __m256 low = _mm256_load_ps(table.at), high = _mm256_load_ps(table.at + 8);

  LEANKV_INLINE vf of(vu code) const {  // the shuffle reads the low 3 bits
    const __m256i index = (__m256i)code;
    if constexpr (B == 2) return (vf)_mm256_permutevar_ps(low, index);  // within halves: the fastest
    const __m256 value = _mm256_permutevar8x32_ps(low, index);
    if constexpr (B < 4) return (vf)value;
    const __m256 other = _mm256_permutevar8x32_ps(high, index);
    const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return (vf)_mm256_blendv_ps(value, other, bit3);
  }
  template <int I>
  LEANKV_INLINE vf at(const uint32_t* words) const {
    return of(code_unmasked<B, I>(words, merge));
  }
};

template <int B>
struct Levels : Lookup<B> {};

// Byte b of all 4-bit levels, for both halves of a register.
struct LevelBytes {
  alignas(32) uint8_t at[4][32] = {};

  constexpr LevelBytes() {
    for (int i = 0; i < 32; ++i) {
      const auto bits = __builtin_bit_cast(uint32_t, level<4>(i % 16));
      for (int b = 0; b < 4; ++b) at[b][i] = static_cast<uint8_t>(bits >> (8 * b));
    }
  }
};

// A byte shuffle looks up 32 codes in 16 entries, four of them their floats' bytes, which unpacking puts
// together: 3.5 instructions for 8 codes, where Lookup takes 5, two of them across halves.
template <>
struct Levels<4> : Lookup<4> {
  static constexpr LevelBytes bytes{};
  __m256i byte[4];

  LEANKV_INLINE Levels() {
    for (int b = 0; b < 4; ++b) {
      byte[b] = _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes.at[b]));
    }
  }
  template <int K, int N>
  LEANKV_INLINE void together(const uint32_t* words, int n, vf (&values)[8][N]) const {
    const __m256i order = _mm256_broadcastsi128_si256(  // of each half: 4 lanes' first bytes, then second
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i two = _mm256_shuffle_epi8((__m256i)load<vu>(words + K * kTile), order);
    every_other<0>(_mm256_and_si256(two, mask), n, values);
    every_other<1>(_mm256_and_si256(_mm256_srli_epi32(two, 4), mask), n, values);
  }

 private:
  template <int First, int N>
  LEANKV_INLINE void every_other(__m256i codes, int n, vf (&values)[8][N]) const {
    __m256i b[4];
    for (int i = 0; i < 4; ++i) b[i] = _mm256_shuffle_epi8(byte[i], codes);
    const __m256i early01 = _mm256_unpacklo_epi8(b[0], b[1]), late01 = _mm256_unpackhi_epi8(b[0], b[1]);
    const __m256i early23 = _mm256_unpacklo_epi8(b[2], b[3]), late23 = _mm256_unpackhi_epi8(b[2], b[3]);
    values[First][n] = (vf)_mm256_unpacklo_epi16(early01, early23);
    values[First + 2][n] = (vf)_mm256_unpackhi_epi16(early01, early23);
    values[First + 4][n] = (vf)_mm256_unpacklo_epi16(late01, late23);
    values[First + 6][n] = (vf)_mm256_unpackhi_epi16(late01, late23);
  }
};

template <>
inline constexpr int kTogether<4> = 8;

template <>
struct Levels<8> {
  LEANKV_INLINE vf of(vu code) const { return cubic<8>(code); }
  template <int I>
  LEANKV_INLINE vf at(const uint32_t* words) const {
    return cubic<8>(code<8, I>(words));
  }
};

LEANKV_INLINE void add_product(vf& sum, vf x, vf y) { sum += x * y; }
LEANKV_INLINE float sum(vf x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
LEANKV_INLINE float max(vf x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
LEANKV_INLINE bool any_above(vf x, float limit) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(limit), _CMP_GT_OQ)) != 0;
}
LEANKV_INLINE vf from_f16(vh h) { return (vf)_mm256_cvtph_ps((__m128i)h); }
LEANKV_INLINE vh to_f16(vf x) { return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }

}  // namespace leankv::avx2
