// What several operations take apart from their inputs, and get back when they are scheduled.
#pragma once

#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "operation.h"
#include "primitives.h"

namespace leankv {

using Rotations = std::pair<RotationArrays, RotationArrays>;

// The parts of a sequence that several operations share.
struct Parts {
  std::vector<Format> formats;
  bool centered = false, rotated = false, ordered = false, scaled = false;
  Rotation k_rotation, v_rotation;  // without signs and order, which are inputs

  void add_bodies(Arrays& in, const std::vector<BodyArrays>& bodies,
                  const std::optional<CenterArrays>& centers) {
    for (const auto& body : bodies) {
      for (const auto& a : {body.pool, body.table, body.lengths}) in.push_back(a);
      formats.push_back(body.format);
    }
    centered = centers.has_value();
    if (centers) {
      in.push_back(centers->k);
      in.push_back(centers->v);
    }
  }

  void add_rotations(Arrays& in, const std::optional<Rotations>& rotations) {
    rotated = rotations.has_value();
    if (!rotations) return;
    const auto plain = [&](const RotationArrays& r) {
      in.push_back(r.signs);
      return Rotation{.dim = r.signs.shape(0), .block = r.block, .head_dim = r.head_dim};
    };
    k_rotation = plain(rotations->first);
    v_rotation = plain(rotations->second);
    ordered = rotations->first.order.has_value();
    if (ordered) in.push_back(*rotations->first.order);
  }

  void add_scales(Arrays& in, const std::optional<mx::array>& scales) {
    scaled = scales.has_value();
    if (scales) in.push_back(*scales);
  }

  // Of keys and values; null without centers.
  std::array<const float*, 2> centers(Reader& reader) const {
    return {reader.dense<float>(centered), reader.dense<float>(centered)};
  }

  // Of keys and values.
  std::array<Rotation, 2> rotations(Reader& reader) const {
    std::array both{k_rotation, v_rotation};
    for (Rotation& rotation : both) rotation.signs = reader.dense<float>(rotated);
    both[0].order = reader.dense<int32_t>(ordered);
    return both;
  }

  std::vector<Body> bodies(Reader& reader) const {
    std::vector<Body> bodies;
    for (const auto& format : formats) bodies.push_back(reader.body(format));
    return bodies;
  }
};

}  // namespace leankv
