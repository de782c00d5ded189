// The bound that the arithmetic of attention is measured against.
#include <chrono>
#include <system_error>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "processors.h"
#include "run.h"
#include "thread_pool.h"

namespace leankv {

double multiply_add_rate(int64_t n) {
  using Clock = std::chrono::steady_clock;
  // Threads of its own, each on a processor of its own: two that share one, or a worker that wakes
  // up late, would pass for a slow processor.
  std::vector<double> rates(thread_count());
  std::vector<std::thread> threads;
  threads.reserve(rates.size());
  try {
    for (int i = 0; i < static_cast<int>(rates.size()); ++i) {
      threads.emplace_back([&, i] {
        stay_on(i);
        const auto start = Clock::now();
        const int64_t done = kernels().multiply_add(n);
        rates[i] = done / std::chrono::duration<double>(Clock::now() - start).count();
      });
    }
  } catch (const std::system_error&) {  // the pool has no more threads than this either
  }
  double sum = 0;
  for (size_t i = 0; i < threads.size(); ++i) {
    threads[i].join();
    sum += rates[i];
  }
  return sum;
}

}  // namespace leankv
