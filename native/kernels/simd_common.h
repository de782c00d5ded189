// Vectors of W floats in the compilers' vector extensions; included by the simd_*.h files, which
// define LEANKV_ISA (a namespace) and LEANKV_WIDTH first and add what needs intrinsics.
//
// Everything is inline and in a namespace of its own: the linker must never take a function that
// was compiled for one instruction set for that of another.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../codebook.h"
#include "args.h"

namespace leankv::LEANKV_ISA {

constexpr int W = LEANKV_WIDTH;
constexpr int NV = kTile / W;  // vectors of a tile's lanes

using vf = float __attribute__((vector_size(4 * W)));
using vi = int32_t __attribute__((vector_size(4 * W)));
using vu = uint32_t __attribute__((vector_size(4 * W)));
using vs = int16_t __attribute__((vector_size(4 * W)));
using vh = uint16_t __attribute__((vector_size(2 * W)));
using vb = uint8_t __attribute__((vector_size(W)));

template <class V, class T>
LEANKV_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
LEANKV_INLINE vf load(const float* p) { return load<vf>(p); }
template <class V, class T>
LEANKV_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
LEANKV_INLINE vf splat(float x) { return x - vf{}; }
LEANKV_INLINE vf vmax(vf x, vf y) {  // y if either is NaN
#if LEANKV_WIDTH == 8
  return (vf)_mm256_max_ps((__m256)x, (__m256)y);  // GCC would compare and blend
#else
  return x > y ? x : y;
#endif
}

template <int I>
struct Index {
  constexpr operator int() const { return I; }
};

template <class F, int... I>
LEANKV_INLINE void unroll_over(F&& f, std::integer_sequence<int, I...>) {
  (f(Index<I>{}), ...);
}

template <int N, class F>
LEANKV_INLINE void unroll(F&& f) {  // f(Index<0>), ..., f(Index<N - 1>)
  unroll_over(f, std::make_integer_sequence<int, N>{});
}

LEANKV_INLINE vi lane_ids() {
  vi ids;
  for (int i = 0; i < W; ++i) ids[i] = i;
  return ids;
}

// Added to a float below 2^22 it leaves no bits behind the point, and the nearest integer in the
// low bits.
constexpr float kWhole = 0x1.8p23f;

// 2^x for x <= 0, to 1e-7; below 2^-126 it is 2^-126, NaN of NaN.
LEANKV_INLINE vf exp2_negative(vf x) {
  x = vmax(splat(-126.0f), x);
  const vf whole = x + kWhole, f = x - (whole - kWhole);
  vf p = 1.5353362e-4f * f + 1.3398874e-3f;
  p = p * f + 9.6184373e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314720e-1f;
  p = p * f + 1.0f;
  return p * (vf)(((vi)whole << 23) + (127 << 23));
}

// Code i of each lane, from the words of W lanes.
template <int B, int I>
LEANKV_INLINE vu code(const uint32_t* words) {
  vu c = load<vu>(words + field_row(B, I) * kTile) >> field_shift(B, I);
  if constexpr (B == 3) {
    return (c & 3u) | (((load<vu>(words + 2 * kTile) >> high_bit(I)) & 1u) << 2);
  }
  if constexpr (field_shift(B, I) + B == 32) return c;
  return c & ((1u << B) - 1);
}

// Words that several codes of B bits are taken from.
template <int B>
LEANKV_INLINE vu load_words(const uint32_t* words) {
  vu loaded = load<vu>(words);
#if LEANKV_WIDTH == 16
  // GCC would load them again for each code, as the operand of its shift. At other widths that is
  // faster than to keep them.
  if constexpr (B == 4) asm("" : "+v"(loaded));
#endif
  return loaded;
}

template <int Bits>
LEANKV_INLINE vu shifted(vu x) {  // right, or left if negative
  if constexpr (Bits < 0) {
    return x << -Bits;
  } else {
    return x >> Bits;
  }
}

// The same with other bits of the word above it, for shuffles that ignore them. At 3 bits,
// merge(low, high, mask) takes the bits of the mask from its second argument. The high bits of
// codes i, i + 4, i + 8, i + 12 are equally far from their fields: all four come from one merged
// word.
template <int B, int I, class Merge>
LEANKV_INLINE vu code_unmasked(const uint32_t* words, Merge&& merge) {
  const vu low = load_words<B>(words + field_row(B, I) * kTile);
  constexpr int shift = field_shift(B, I);
  if constexpr (B == 3) {
    const vu high = load_words<B>(words + 2 * kTile);
    if constexpr (shift == 30) {  // there is no room above the field
      return merge(low >> shift, shifted<high_bit(I) - 2>(high), 4u);
    }
    constexpr uint32_t mask = 0x01010101u << (2 * (I & 3) + 2);
    return merge(low, shifted<high_bit(I) - (shift + 2)>(high), mask) >> shift;
  }
  return low >> shift;
}

// The order in which codes are taken: those of one merged word in a row.
template <int B>
constexpr int in_order(int j) {
  return B == 3 ? (j & 16) + 4 * (j & 3) + ((j >> 2) & 3) : j;
}

// Codes of a lane that a tile's loop decodes at once. If it is not 1, Levels<B>::together<K>(words,
// n, values) sets vector n of the T codes from place T * K of in_order<B> on.
template <int B>
inline constexpr int kTogether = 1;

// Where LEANKV_PAIRS is defined, see pairs.h: row<K>(words, f) calls f(Index<i>, levels) for each
// pair i that row K of the words of W lanes holds; add_products(sum, levels, factors) multiplies
// and adds.
template <int B>
struct PairLevels;

template <int B>
LEANKV_INLINE vf cubic(vu code) {
  const vf x = __builtin_convertvector((vi)code, vf) - kMiddle<B>;
  return x * (Cubic<B>::b * (x * x) + Cubic<B>::a);
}

LEANKV_INLINE vf from_bf16(vh h) {
#if LEANKV_WIDTH == 8
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);  // GCC would widen in halves
#else
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

LEANKV_INLINE vh to_bf16(vf x) {  // to nearest even; NaN stays NaN
  vu u = (vu)x;
  const vu rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (u >> 16) | 0x40u, vh);
}

// fp16 without instructions for it.
LEANKV_INLINE vf from_f16_portable(vh h) {
  const vu u = __builtin_convertvector(h, vu);
  const vf scaled = (vf)((u & 0x7FFFu) << 13) * 0x1p112f;
  const vu special = (u & 0x7C00u) == 0x7C00u ? (vu)scaled | 0x7F800000u : (vu)scaled;
  return (vf)(special | ((u & 0x8000u) << 16));
}

LEANKV_INLINE vh to_f16_portable(vf x) {
  const vu sign = (vu)x & 0x80000000u, u = (vu)x ^ sign;
  // Adding 0.5 aligns the 10 bits of a subnormal result at the low end, rounded to nearest even.
  const vu subnormal = (vu)((vf)u + 0.5f) - 0x3F000000u;
  const vu normal = (u - 0x38000000u + 0xFFFu + ((u >> 13) & 1u)) >> 13;
  vu h = u < 0x38800000u ? subnormal : normal;
  h = u >= 0x47800000u ? (vu{} + 0x7C00u) : h;
  h = u > 0x7F800000u ? (vu{} + 0x7E00u) : h;
  return __builtin_convertvector(h | (sign >> 16), vh);
}

}  // namespace leankv::LEANKV_ISA
