// AVX2, FMA and F16C: 8 floats; the 16 levels of 4 bits take two registers and a blend.
#pragma once

#include <immintrin.h>

#define LEANKV_ISA avx2
#define LEANKV_WIDTH 8
#include "simd_common.h"

namespace leankv::avx2 {

constexpr int kAccumulators = 8;  // of 16 registers

LEANKV_INLINE vu merge(vu low, vu high, uint32_t mask) { return (low & ~mask) | (high & mask); }

template <int B>
struct Levels {
  static constexpr LevelTable<B, 16> table{};
  const __m256 low = _mm256_load_ps(table.at), high = _mm256_load_ps(table.at + 8);

  LEANKV_INLINE vf of(vu code) const {  // the shuffle reads the low 3 bits
    const __m256i index = (__m256i)code;
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
