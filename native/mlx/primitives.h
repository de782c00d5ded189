// The operations as lazy MLX arrays. Shapes and meaning are those of leankv_mlx/kernels/types.py.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "../run.h"
#include "mlx/array.h"
#include "mlx/utils.h"

namespace leankv {

namespace mx = mlx::core;

struct BodyArrays {
  mx::array pool, table, lengths;
  Format format;
};

// Signs [dim] and head_dim of a Hadamard rotation, and the order in which it takes the channels of
// each KV head, int32 [H, head_dim].
struct RotationArrays {
  mx::array signs;
  int block, head_dim;
  std::optional<mx::array> order;
};

struct CenterArrays {
  mx::array k, v;
};

// The tokens of a sequence.
struct SequenceArrays {
  std::vector<BodyArrays> bodies;
  mx::array exact_k, exact_v;
  std::optional<CenterArrays> centers;
  std::optional<mx::array> scales;  // float32 [H, head_dim]: queries are multiplied by them first
};

// Queries [Hq, L, D] of a sequence or [B, Hq, L, D] of several -> output [.., Hq, L, Dv] and
// log-sum-exp [.., Hq, L]; if `skip` is not 0, also what was read of each KV head, int32
// [B * H, 2]: blocks whose values were read, and all blocks. With rotations the queries come as the
// model made them and the output leaves so, in the dtype of the queries; without them the output is
// float32.
std::vector<mx::array> decode_attention(
    const mx::array& queries, const std::vector<SequenceArrays>& sequences, float scale,
    bool causal, const std::optional<mx::array>& sink_logits,
    const std::optional<std::pair<RotationArrays, RotationArrays>>& rotations, float skip);

// Rows [H, N, dim], `present` bool [H, N] -> output [Hq, L, Dv] in the dtype of the queries. With
// rotations the queries come as the model made them and the output leaves so.
mx::array prefill_attention(
    const mx::array& queries, const mx::array& k, const mx::array& v, float scale, bool causal,
    const std::optional<mx::array>& present, const std::optional<mx::array>& sink_logits,
    const std::optional<std::pair<RotationArrays, RotationArrays>>& rotations);

// shaping [H, Dk, Dk] -> blocks [H, ceil(T / 32), words].
mx::array encode(const mx::array& k, const mx::array& v, const CenterArrays& centers,
                 const Format& format, Rounding rounding, const std::optional<mx::array>& shaping);

// Slots int32 [H, T] of a body, -1 for none -> blocks [H, ceil(T / 32), words].
mx::array repack(const BodyArrays& body, const mx::array& index);

// -> keys [H, N, Dk] and values [H, N, Dv] of all tokens in `dtype`: `sinks` exact rows, the
// bodies in their places, the other exact rows; un-rotated if rotations are given.
std::vector<mx::array> decode(
    const std::vector<BodyArrays>& bodies, const std::vector<Place>& places,
    const mx::array& exact_k, const mx::array& exact_v, const std::optional<CenterArrays>& centers,
    int sinks, mx::Dtype dtype,
    const std::optional<std::pair<RotationArrays, RotationArrays>>& rotations);

// Rows [H, T, head_dim] of a sequence or [B, H, T, head_dim] of several -> exact rows
// [H, E + T, dim] of each: the keys of all, then the values. New rows are rotated and put behind
// the exact ones; keys are divided by the `scales` of their sequence first.
std::vector<mx::array> append(const std::vector<mx::array>& exact_k,
                              const std::vector<mx::array>& exact_v, const mx::array& k,
                              const mx::array& v,
                              const std::vector<std::optional<mx::array>>& scales,
                              const std::pair<RotationArrays, RotationArrays>& rotations);

}  // namespace leankv
