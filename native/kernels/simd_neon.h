// NEON of AArch64: 4 floats; levels are computed, a table would take four shuffles.
#pragma once

#include <arm_neon.h>

#define LEANKV_ISA neon
#define LEANKV_WIDTH 4
#include "simd_common.h"

namespace leankv::neon {

constexpr int kAccumulators = 16;  // of 32 registers

template <int B>
struct Levels {
  LEANKV_INLINE vf of(vu code) const { return cubic<B>(code); }
  template <int I>
  LEANKV_INLINE vf at(const uint32_t* words) const {
    return cubic<B>(code<B, I>(words));
  }
};

LEANKV_INLINE void add_product(vf& sum, vf x, vf y) { sum += x * y; }
LEANKV_INLINE float sum(vf x) { return vaddvq_f32((float32x4_t)x); }
LEANKV_INLINE float max(vf x) { return vmaxvq_f32((float32x4_t)x); }
LEANKV_INLINE bool any_above(vf x, float limit) { return max(x) > limit; }
LEANKV_INLINE vf from_f16(vh h) { return (vf)vcvt_f32_f16((float16x4_t)h); }
LEANKV_INLINE vh to_f16(vf x) { return (vh)vcvt_f16_f32((float32x4_t)x); }

}  // namespace leankv::neon
