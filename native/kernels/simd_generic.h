// No intrinsics: 4 floats in whatever the compiler makes of them.
#pragma once

#define LEANKV_ISA generic
#define LEANKV_WIDTH 4
#include "simd_common.h"

namespace leankv::generic {

constexpr int kAccumulators = 8;  // x86-64 has 16 registers

template <int B>
struct Levels {
  LEANKV_INLINE vf of(vu code) const { return cubic<B>(code); }
  template <int I>
  LEANKV_INLINE vf at(const uint32_t* words) const {
    return cubic<B>(code<B, I>(words));
  }
};

LEANKV_INLINE void add_product(vf& sum, vf x, vf y) { sum += x * y; }
LEANKV_INLINE float sum(vf x) { return (x[0] + x[1]) + (x[2] + x[3]); }
LEANKV_INLINE float max(vf x) {
  const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
LEANKV_INLINE bool any_above(vf x, float limit) { return max(x) > limit; }
LEANKV_INLINE vf from_f16(vh h) { return from_f16_portable(h); }
LEANKV_INLINE vh to_f16(vf x) { return to_f16_portable(x); }

}  // namespace leankv::generic
