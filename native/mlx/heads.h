// Queries and keys by head as lazy MLX arrays, see leankv_mlx/projections/heads.py.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "mlx/array.h"

namespace leankv {

namespace mx = mlx::core;

using NormOption = std::optional<std::pair<mx::array, float>>;  // weight [D] and epsilon

// float32 [B, L, heads * D] -> [B, heads, L, D] of queries and of keys. Offsets: one
// of all, or B of them.
std::vector<mx::array> heads(const mx::array& queries, const mx::array& keys, int dim,
                             const mx::array& freqs, float scale, const std::vector<int>& offsets,
                             const NormOption& query_norm, const NormOption& key_norm);

}  // namespace leankv
