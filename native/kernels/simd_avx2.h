// AVX2, FMA and F16C: 8 floats; codes of 4 bits are looked up byte by byte of their levels.
#pragma once

#include <immintrin.h>

#define LEANKV_ISA avx2
#define LEANKV_WIDTH 8
#define LEANKV_PAIRS
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
    // Within halves: the fastest.
    if constexpr (B == 2) return (vf)_mm256_permutevar_ps(low, index);
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

// A byte shuffle looks up 32 codes in 16 entries, four of them their floats' bytes, which unpacking
// puts together: 3.5 instructions for 8 codes, where Lookup takes 5, two of them across halves.
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
    // Of each half: 4 lanes' first bytes, then second.
    const __m256i order = _mm256_broadcastsi128_si256(
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
    const __m256i early01 = _mm256_unpacklo_epi8(b[0], b[1]),
                  late01 = _mm256_unpackhi_epi8(b[0], b[1]);
    const __m256i early23 = _mm256_unpacklo_epi8(b[2], b[3]),
                  late23 = _mm256_unpackhi_epi8(b[2], b[3]);
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

LEANKV_INLINE int32_t max(vi x) {
  __m128i s =
      _mm_max_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  s = _mm_max_epi32(s, _mm_unpackhi_epi64(s, s));
  return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 1)));
}
LEANKV_INLINE vf to_float(vi x) { return (vf)_mm256_cvtepi32_ps((__m256i)x); }

LEANKV_INLINE void add_products(vi& sum, vs x, const int16_t* y) {
  sum += (vi)_mm256_madd_epi16((__m256i)x, (__m256i)load<vs>(y));
  asm("" : "+x"(sum));  // GCC would put additions off until it runs out of registers
}

// The int16 levels of codes in the low 4 bits of each byte, or of those from bit First on, looked
// up byte by byte. Each half of `codes` has 8 pairs, of which it has the codes of one lane side by
// side.
template <int B, int First = 0>
struct FixedLookup {
  struct Bytes {  // of the levels, for both halves of a register
    alignas(32) uint8_t at[2][32] = {};

    constexpr Bytes() {
      for (int i = 0; i < 32; ++i) {
        const auto bits = static_cast<uint16_t>(fixed_level<B>((i >> First) % (1 << B)));
        for (int b = 0; b < 2; ++b) at[b][i] = static_cast<uint8_t>(bits >> (8 * b));
      }
    }
  };
  static constexpr Bytes bytes{};
  const __m256i low = _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes.at[0]));
  const __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes.at[1]));

  // f(Index<Pair>, levels) of the pairs in the front of each half, then f(Index<Pair + Next>,
  // levels) of those in its back.
  template <int Pair, int Next, class F>
  LEANKV_INLINE void pairs(__m256i codes, F&& f) const {
    const __m256i l = _mm256_shuffle_epi8(low, codes), h = _mm256_shuffle_epi8(high, codes);
    f(Index<Pair>{}, (vs)_mm256_unpacklo_epi8(l, h));
    f(Index<Pair + Next>{}, (vs)_mm256_unpackhi_epi8(l, h));
  }
};

LEANKV_INLINE __m256i both(__m128i half) { return _mm256_broadcastsi128_si256(half); }
LEANKV_INLINE __m256i ordered(const uint32_t* words, __m128i order) {  // the bytes of each half
  return _mm256_shuffle_epi8((__m256i)load<vu>(words), both(order));
}
LEANKV_INLINE __m256i masked(__m256i x, int mask) {
  return _mm256_and_si256(x, _mm256_set1_epi8(mask));
}

template <>
struct PairLevels<4> {
  static constexpr int kRows = 4;
  const FixedLookup<4> lookup;

  template <int K, class F>
  LEANKV_INLINE void row(const uint32_t* words, F&& f) const {
    const __m256i two = ordered(  // byte b of a word is codes 2b and 2b + 1
        words + K * kTile, _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    lookup.template pairs<4 * K, 2>(masked(two, 15), f);
    lookup.template pairs<4 * K + 1, 2>(masked(_mm256_srli_epi32(two, 4), 15), f);
  }
};

LEANKV_INLINE __m256i four_codes(const uint32_t* words) {  // byte b of a word is codes 4b to 4b + 3
  return ordered(words, _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
}

template <>
struct PairLevels<2> {
  static constexpr int kRows = 2;
  const FixedLookup<2> even;
  const FixedLookup<2, 2> odd;

  template <int K, class F>
  LEANKV_INLINE void row(const uint32_t* words, F&& f) const {
    const __m256i four = four_codes(words + K * kTile);
    const __m256i front = masked(four, 15), back = masked(_mm256_srli_epi32(four, 4), 15);
    even.template pairs<8 * K, 4>(front, f);
    odd.template pairs<8 * K + 1, 4>(front, f);
    even.template pairs<8 * K + 2, 4>(back, f);
    odd.template pairs<8 * K + 3, 4>(back, f);
  }
};

template <>
struct PairLevels<3> {
  static constexpr int kRows = 2;
  const FixedLookup<3> lookup;

  template <int K, class F>
  LEANKV_INLINE void row(const uint32_t* words, F&& f) const {
    const __m256i four = four_codes(words + K * kTile);
    const __m256i high = masked((__m256i)shifted<4 * K>((vu)four_codes(words + 2 * kTile)), 15);
    // The high bits of two codes to bits 2 and 6: those of codes 0 and 2, or 1 and 3.
    const __m256i of_even =
        both(_mm_setr_epi8(0, 4, 0, 4, 64, 68, 64, 68, 0, 4, 0, 4, 64, 68, 64, 68));
    const __m256i of_odd =
        both(_mm_setr_epi8(0, 0, 4, 4, 0, 0, 4, 4, 64, 64, 68, 68, 64, 64, 68, 68));
    const __m256i low_even = masked(four, 0x33), low_odd = masked(_mm256_srli_epi32(four, 2), 0x33);
    const __m256i even = _mm256_or_si256(low_even, _mm256_shuffle_epi8(of_even, high));
    const __m256i odd = _mm256_or_si256(low_odd, _mm256_shuffle_epi8(of_odd, high));
    // A shuffle ignores bits 4 to 6, and bit 7 is 0.
    lookup.template pairs<8 * K, 4>(even, f);
    lookup.template pairs<8 * K + 1, 4>(odd, f);
    lookup.template pairs<8 * K + 2, 4>(_mm256_srli_epi32(even, 4), f);
    lookup.template pairs<8 * K + 3, 4>(_mm256_srli_epi32(odd, 4), f);
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
