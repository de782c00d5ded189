// What the parts of the driver share: inputs of every shape, and checks.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../dispatch.h"
#include "../run.h"

namespace leankv {

inline std::mt19937 draw(1);

inline std::vector<float> normal(size_t n) {
  std::normal_distribution<float> distribution;
  std::vector<float> x(n);
  for (float& v : x) v = distribution(draw);
  return x;
}

inline Side side(int dim, int first) {
  constexpr int choices[] = {2, 3, 4, 8, 0};
  Side side;
  side.groups = dim / kTile;
  for (int c = 0; c < side.groups; ++c) side.bits[c] = choices[(first + c) % 5];
  if (side.groups == 1 && side.bits[0] == 0) side.bits[0] = 4;
  return side;
}

template <class T>
Vectors rows_of(const std::vector<T>& data, Type type, int tokens, int dim) {
  return {
      .data = data.data(), .type = type, .head_stride = int64_t{tokens} * dim, .row_stride = dim};
}

template <class T>
Output output_of(std::vector<T>& data, Type type, int tokens, int dim) {
  return {
      .data = data.data(), .type = type, .head_stride = int64_t{tokens} * dim, .row_stride = dim};
}

inline Rotation rotation(const std::vector<float>& signs, int dim) {
  return {.signs = signs.data(), .dim = dim, .block = dim & -dim, .head_dim = dim};
}

inline void check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "%s: %s\n", kernels().name, what);
  std::exit(1);
}

void masked_heads(int dim, int head_dim, int length, int blocks, Type type);
void products(int bits, int group, int rows, int outputs, int inputs, Type type, int turn);
void heads_of(int batch, int length, int dim, int turned, bool normed);

}  // namespace leankv
