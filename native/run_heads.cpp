// Norm and rotary position of each head. Small beside the products around it, so it is written
// once, for every instruction set.
#include "heads.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "scratch.h"
#include "thread_pool.h"

namespace leankv {
namespace {

constexpr int kRows = 64;  // tokens of a task: some tens of microseconds

// The factor that norms a head.
float norm_of(const float* x, int dim, float eps) {
  float sums[8] = {};
  for (int i = 0; i < dim; i += 8) {
    for (int j = 0; j < std::min(8, dim - i); ++j) sums[j] += x[i + j] * x[i + j];
  }
  float sum = 0;
  for (float s : sums) sum += s;
  return 1 / std::sqrt(sum / static_cast<float>(dim) + eps);
}

void turn(float* x, const float* cosines, const float* sines, int half) {
  for (int i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cosines[i] - second * sines[i];
    x[i + half] = first * sines[i] + second * cosines[i];
  }
}

void one_row(const HeadsJob& job, int b, int l, float* cosines, float* sines) {
  const int half = job.turned / 2;
  const float position = static_cast<float>(job.offsets[b] + l) * job.scale;
  for (int i = 0; i < half; ++i) {
    const float angle = position * job.freqs[i];
    cosines[i] = std::cos(angle);
    sines[i] = std::sin(angle);
  }
  for (const HeadsSide& side : job.sides) {
    const int64_t row = int64_t{b} * job.length + l;
    for (int h = 0; h < side.heads; ++h) {
      const float* from = side.from + (row * side.heads + h) * job.dim;
      float* to = side.to + ((int64_t{b} * side.heads + h) * job.length + l) * job.dim;
      if (side.norm) {
        const float factor = norm_of(from, job.dim, side.eps);
        for (int i = 0; i < job.dim; ++i) to[i] = from[i] * factor * side.norm[i];
      } else {
        std::copy_n(from, job.dim, to);
      }
      turn(to, cosines, sines, half);
    }
  }
}

}  // namespace

void run_heads(const HeadsJob& job) {
  const int rows = job.batch * job.length;
  parallel_for((rows + kRows - 1) / kRows, [&](int task) {
    const Scratch<float> cosines(job.turned / 2), sines(job.turned / 2);
    for (int row = task * kRows; row < std::min(rows, (task + 1) * kRows); ++row) {
      one_row(job, row / job.length, row % job.length, cosines.data.get(), sines.data.get());
    }
  });
}

}  // namespace leankv
