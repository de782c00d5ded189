// AVX-512 (F, BW, DQ, VL): 16 floats; all 4-bit levels fit one register.
#pragma once

#include <immintrin.h>

#define LEANKV_ISA avx512
#define LEANKV_WIDTH 16
#include "simd_common.h"

namespace leankv::avx512 {

constexpr int kAccumulators = 16;  // of 32 registers

// sum += x * y. GCC would choose the form that overwrites a factor and then copy registers around.
LEANKV_INLINE void add_product(vf& sum, vf x, vf y) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
}

LEANKV_INLINE vu merge(vu low, vu high, uint32_t mask) {  // 0xCA: mask ? high : low
  return (vu)_mm512_ternarylogic_epi32(_mm512_set1_epi32(mask), (__m512i)high, (__m512i)low, 0xCA);
}

template <int B>
struct Levels {
  static constexpr LevelTable<B, 16> table{};
  const __m512 values = _mm512_load_ps(table.at);

  LEANKV_INLINE vf of(vu code) const {  // the shuffle reads the low 4 bits
    return (vf)_mm512_permutexvar_ps((__m512i)code, values);
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

LEANKV_INLINE float sum(vf x) { return _mm512_reduce_add_ps((__m512)x); }
LEANKV_INLINE float max(vf x) { return _mm512_reduce_max_ps((__m512)x); }
LEANKV_INLINE bool any_above(vf x, float limit) {
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
}
LEANKV_INLINE vf from_f16(vh h) { return (vf)_mm512_cvtph_ps((__m256i)h); }
LEANKV_INLINE vh to_f16(vf x) { return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }

}  // namespace leankv::avx512
