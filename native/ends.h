// Where attention begins and ends: a query as its kernel takes it, an output as the model gets it.
#pragma once

#include <algorithm>

#include "dispatch.h"
#include "run.h"

namespace leankv {

// The channels of a row of a KV head, as the rotation takes them.
inline void put_in_order(const Rotation& rotation, int head, float* row) {
  if (!rotation.order) return;
  const int32_t* order = rotation.order + int64_t{head} * rotation.head_dim;
  float given[kMaxDim];
  std::copy_n(row, rotation.head_dim, given);
  for (int i = 0; i < rotation.head_dim; ++i) row[i] = given[order[i]];
}

// One query of a KV head -> row [dim], scaled, rotated and in units of log2. `scales`: [head_dim]
// or null.
inline void read_query(const Ends& ends, int head, int query_head, int token, int dim,
                       const float* scales, float* row) {
  const int given = ends.k_rotation.signs ? ends.k_rotation.head_dim : dim;
  std::fill(row + given, row + dim, 0.0f);
  kernels().read(ends.queries, query_head, token, 1, given, row);
  if (scales) {
    for (int i = 0; i < given; ++i) row[i] *= scales[i];
    // As an array of the queries' type would hold them.
    float rounded[kMaxDim];
    const Type type = ends.queries.type;
    kernels().write({.data = rounded, .type = type}, 0, 0, 1, given, row);
    kernels().read({.data = rounded, .type = type}, 0, 0, 1, given, row);
  }
  put_in_order(ends.k_rotation, head, row);
  if (ends.k_rotation.signs) kernels().rotate(ends.k_rotation, row);
  for (int i = 0; i < dim; ++i) row[i] *= ends.scale * kLog2E;
}

// Row [dim] -> one output; changes the row.
inline void write_output(const Ends& ends, int query_head, int token, int dim, float* row) {
  if (ends.v_rotation.signs) kernels().unrotate(ends.v_rotation, row);
  const int wanted = ends.v_rotation.signs ? ends.v_rotation.head_dim : dim;
  kernels().write(ends.out, query_head, token, 1, wanted, row);
}

}  // namespace leankv
