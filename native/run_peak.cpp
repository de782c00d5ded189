// What the processor could do at most, for benchmarks.
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "run.h"
#include "thread_pool.h"

namespace leankv {

double multiply_add_rate(int64_t n) {
  const Kernels& kernel = kernels();
  std::atomic<int64_t> done{0};
  const auto work = [&] { done += kernel.multiply_add(n); };
  const auto start = std::chrono::steady_clock::now();
  // Threads of its own: a worker of the pool that wakes up late would leave its share to others.
  std::vector<std::thread> others;
  for (int i = 1; i < thread_count(); ++i) others.emplace_back(work);
  work();
  for (auto& thread : others) thread.join();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  return static_cast<double>(done) / took.count();
}

}  // namespace leankv
