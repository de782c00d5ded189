// The operations with quantized weights as lazy MLX arrays. Shapes and meaning are those of
// leankv_mlx/projections/.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "../run.h"
#include "mlx/array.h"

namespace leankv {

namespace mx = mlx::core;

struct WeightArrays {
  mx::array codes, scales, zeros;
  int outputs, bits, group;
};

struct ProjectOptions {
  std::optional<std::pair<mx::array, float>> norm;  // weight and epsilon
  std::optional<float> threshold;
  std::optional<mx::array> norms;
  std::optional<mx::array> residual;
  Gate gate = Gate::none;
};

// x [..., K] -> [..., N] of each weight (with a gate one output for two), in the dtype of x; with a
// threshold also how many channels took part, int32 [].
std::vector<mx::array> project(const mx::array& x, const std::vector<WeightArrays>& weights,
                               const std::vector<std::optional<mx::array>>& biases,
                               const ProjectOptions& options);

// MLX's codes uint32 [N, K * bits / 32] -> [T, K, 16], aligned to cache lines.
mx::array relay(const mx::array& codes, int bits);

// The inverse.
mx::array restore(const WeightArrays& weight);

// Rows int32 [..] of the weight -> [.., K].
mx::array rows(const WeightArrays& weight, const mx::array& ids, mx::Dtype dtype);

}  // namespace leankv
