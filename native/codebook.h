// The cubic codebooks of leankv_mlx/codec/codebook.py: level(code) = x * (a + b * x * x) with
// x = code - (2^B - 1) / 2, in units of the vector's scale. Tables are built by the compiler, with
// the same float32 roundings as the reference.
#pragma once

namespace leankv {

// `fixed`: levels as integers are this many times as large. Found by search, so that rounding errs
// by 5e-6 or less (root mean square, in units of the scale) and no integer is beyond 5,540.
template <int B>
struct Cubic;
template <>
struct Cubic<2> {
  static constexpr float a = 0.8914833f, b = 0.04896949f, fixed = 2872.55f;
};
template <>
struct Cubic<3> {
  static constexpr float a = 0.4720540f, b = 0.01151046f, fixed = 2113.99f;
};
template <>
struct Cubic<4> {
  static constexpr float a = 0.2401280f, b = 0.002102614f, fixed = 2061.03f;
};
template <>
struct Cubic<8> {
  static constexpr float a = 0.015811765f, b = 1.0537124e-6f;
};

template <int B>
constexpr float kMiddle = ((1 << B) - 1) / 2.0f;

template <int B>
constexpr float level(int code) {
  const float x = static_cast<float>(code) - kMiddle<B>;
  return x * (Cubic<B>::a + Cubic<B>::b * x * x);
}

// Levels in code order, repeated to N entries: a shuffle that reads more index bits than a code has
// then needs no mask.
template <int B, int N>
struct LevelTable {
  alignas(64) float at[N] = {};

  constexpr LevelTable() {
    for (int i = 0; i < N; ++i) at[i] = level<B>(i % (1 << B));
  }
};

template <int B>
constexpr int fixed_level(int code) {
  const float x = level<B>(code) * Cubic<B>::fixed;
  return static_cast<int>(x < 0 ? x - 0.5f : x + 0.5f);
}

// Midpoints between neighbouring levels.
template <int B>
struct Thresholds {
  float at[(1 << B) - 1] = {};

  constexpr Thresholds() {
    for (int i = 0; i + 1 < 1 << B; ++i) at[i] = (level<B>(i) + level<B>(i + 1)) * 0.5f;
  }
};

}  // namespace leankv
