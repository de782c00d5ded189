// Queries and keys of a few tokens by head, normed and turned by their positions.
#pragma once

#include <array>
#include <vector>

namespace leankv {

// Of queries, or of keys: [B, L, heads * D] becomes [B, heads, L, D].
struct HeadsSide {
  const float* from = nullptr;
  float* to = nullptr;
  int heads = 0;
  const float* norm = nullptr;  // [D], or null
  float eps = 0;
};

struct HeadsJob {
  std::array<HeadsSide, 2> sides;
  int batch = 0, length = 0, dim = 0;
  const float* freqs = nullptr;  // [turned / 2]: radians a position
  int turned = 0;                // first channels of a head; i and i + turned / 2 are a pair
  float scale = 1;               // of positions
  std::vector<int> offsets;      // position of the first token of each of the batch
};
void run_heads(const HeadsJob& job);

}  // namespace leankv
