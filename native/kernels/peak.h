// The arithmetic that attention cannot do without, alone: what a processor could do at most.
#pragma once

namespace leankv::LEANKV_ISA {

// At least n multiply-adds of floats, on sums that do not wait for each other; returns how many.
inline int64_t multiply_add(int64_t n) {
  volatile float given[3] = {0.99f, 0.5f};  // numbers that the compiler does not know
  const vf x = splat(given[0]), y = splat(given[1]);
  vf sums[kAccumulators];
  for (int k = 0; k < kAccumulators; ++k) sums[k] = splat(given[0] * static_cast<float>(k));
  const int64_t rounds = n / (kAccumulators * W) + 1;
  for (int64_t i = 0; i < rounds; ++i) {
    unroll<kAccumulators>([&](auto k) LEANKV_LAMBDA { sums[k] = sums[k] * x + y; });
  }
  for (int k = 1; k < kAccumulators; ++k) sums[0] += sums[k];
  given[2] = sum(sums[0]);
  return rounds * kAccumulators * W;
}

}  // namespace leankv::LEANKV_ISA
