// Quantized weights in the layout of leankv_mlx/projections/weight.py, and what their kernels take.
//
// Shapes: K inputs, N outputs, R rows, P = 16 * (32 / bits) outputs of a tile, T tiles. In word
// [t, k, l] of the codes, the field of `bits` bits from bit f * bits on is the code of channel k
// for output t * P + f * 16 + l.
#pragma once

#include <cstdint>

#include "kernels/vectors.h"

namespace leankv {

constexpr int kLanes = 16;             // words of a channel in a tile: a cache line
constexpr int kStretch = 32;           // channels; groups are 1, 2 or 4 times as many
constexpr int kMaxTile = 16 * kLanes;  // P at 2 bits
constexpr int kMaxRows = 32;           // that multiply with codes; more do with unpacked ones
constexpr int kAhead = 32;             // channels that are fetched ahead

struct Weight {
  const uint32_t* codes = nullptr;  // [T, K, 16]
  const void* scales = nullptr;     // [T, K / group, P]
  const void* zeros = nullptr;      // the same: what MLX calls biases
  Type type = Type::f32;            // of both
  int outputs = 0, inputs = 0, bits = 0, group = 0;

  LEANKV_INLINE int tile() const { return kLanes * (32 / bits); }
  LEANKV_INLINE int tiles() const { return (outputs + tile() - 1) / tile(); }
  LEANKV_INLINE const uint32_t* tile_codes(int t) const {
    return codes + int64_t{t} * inputs * kLanes;
  }
  // Row g of the scales or zeros of a tile.
  LEANKV_INLINE const char* side(const void* all, int t, int g) const {
    const int64_t row = int64_t{t} * (inputs / group) + g;
    return static_cast<const char*>(all) + row * tile() * size_of(type);
  }
};

// The input channels that take part in the products of a few rows, n of them.
struct Channels {
  int rows = 0;                     // R, at most kMaxRows
  const int32_t* ids = nullptr;     // [n + kAhead], rising; the last kAhead are to be fetched only
  const int32_t* starts = nullptr;  // [K / 32 + 1]: how many of them are before each stretch
  const float* values = nullptr;    // [n, R]
  const float* sums = nullptr;      // [K / 32, R]: of the values of a stretch
};

enum class Gate { none, silu, gelu, gelu_approx };

// What becomes of products: bias, gate, factors, residual, in this order.
struct Finish {
  const float* bias = nullptr;  // [N] or null
  Gate gate = Gate::none;
  Vectors factors{};   // [1, R, N] of f32, none without data
  Vectors residual{};  // [1, R, N], none without data
  Output out{};        // [1, R, N]
};

// Products of rows [row, row + rows) and outputs [column, column + columns), in parts to be added:
// part p of row r is from[p * part_stride + r * row_stride ..], whole vectors of it.
struct Products {
  const float* from = nullptr;
  int64_t row_stride = 0, part_stride = 0;
  int parts = 1;
  int row = 0, rows = 0, column = 0, columns = 0;
};

}  // namespace leankv
