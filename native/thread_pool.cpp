#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "processors.h"

namespace leankv {
namespace {

// How long a thread waits awake, the caller for tasks that a worker has begun and a worker for the
// next loop: falling asleep and being woken takes ten to twenty microseconds.
constexpr std::chrono::microseconds kAwake{50};

class Pool {
 public:
  // `awake`: whether there is a processor for each thread, so that waiting awake takes it from
  // none.
  explicit Pool(bool awake) : awake_(awake) {}

  // Not part of the constructor: those that were made wait in this object, so it must stay if one
  // cannot be.
  void start(int workers) {
    elsewhere_.reserve(workers);
    try {
      for (int i = 0; i < workers; ++i) {
        std::thread worker([this] { work(); });
        elsewhere_.add(worker);
        worker.detach();  // it holds nothing but this object, which lives as long as the process
      }
    } catch (const std::system_error&) {  // no more threads for this user, or no memory for a stack
    } catch (const std::bad_alloc&) {
    }
  }

  // False if another thread is running a loop.
  bool try_run(int n, const std::function<void(int)>& task) {
    std::unique_lock<std::mutex> loop(loop_, std::try_to_lock);
    if (!loop.owns_lock()) return false;
    if (awake_) elsewhere_.move();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      next_ = 0;
      end_ = n;
      ++round_;
    }
    begin_.notify_all();
    drain(task, n);
    std::unique_lock<std::mutex> lock(mutex_);
    task_ = nullptr;  // a worker that wakes up from now on finds no loop
    if (busy_ > 0) stay_awake(lock, [this] { return busy_ == 0; });
    done_.wait(lock, [this] { return busy_ == 0; });
    return true;
  }

 private:
  void drain(const std::function<void(int)>& task, int n) {
    for (int i = next_++; i < n; i = next_++) task(i);
  }

  // Returns when ready() or kAwake later; without the lock meanwhile.
  template <class F>
  void stay_awake(std::unique_lock<std::mutex>& lock, F&& ready) {
    if (!awake_) return;
    lock.unlock();
    const auto end = std::chrono::steady_clock::now() + kAwake;
    // Yields to whoever wakes up on this processor: at the end of an evaluation that is MLX's
    // caller. And tries the lock, which whoever made it ready may hold for a moment more: waiting
    // for it is to sleep.
    while (!(ready() && lock.try_lock()) && std::chrono::steady_clock::now() < end) sched_yield();
    if (!lock.owns_lock()) lock.lock();
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (long seen = 0;;) {
      begin_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (!task_) continue;
      const auto& task = *task_;
      const int n = end_;
      ++busy_;
      lock.unlock();
      drain(task, n);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
      stay_awake(lock, [&] { return round_ != seen; });
    }
  }

  const bool awake_;
  Elsewhere elsewhere_;
  std::mutex loop_;   // held by whoever runs a loop
  std::mutex mutex_;  // of everything below
  std::condition_variable begin_, done_;
  const std::function<void(int)>* task_ = nullptr;
  std::atomic<int> next_{0};
  int end_ = 0;
  // Written under the mutex, also read without it.
  std::atomic<int> busy_{0};
  std::atomic<long> round_{0};
};

// What the pool has, or would have if all its workers could be made.
int all_threads() {
  static const int count = [] {
    const char* text = std::getenv("LEANKV_THREADS");
    const int wanted = text ? std::atoi(text) : 0;
    return std::clamp(wanted > 0 ? wanted : processors(), 1, 256);
  }();
  return count;
}

std::atomic<bool> one_thread{false};

// Never destroyed: at exit the workers may still be asleep in it.
std::atomic<Pool*> instance{nullptr};
std::mutex starting;

Pool& pool() {
  if (Pool* ready = instance.load(std::memory_order_acquire)) return *ready;
  std::lock_guard<std::mutex> lock(starting);
  if (!instance.load(std::memory_order_relaxed)) {
    // A forked child has none of the workers: it starts over with a pool of its own.
    static const int registered =
        pthread_atfork([] { starting.lock(); }, [] { starting.unlock(); },
                       [] {
                         instance.store(nullptr, std::memory_order_relaxed);
                         starting.unlock();
                       });
    (void)registered;
    const int threads = all_threads();
    Pool* made = new Pool(threads <= processors());
    made->start(threads - 1);
    instance.store(made, std::memory_order_release);
  }
  return *instance.load(std::memory_order_relaxed);
}

}  // namespace

int thread_count() { return one_thread.load(std::memory_order_relaxed) ? 1 : all_threads(); }

void use_one_thread(bool on) { one_thread.store(on, std::memory_order_relaxed); }

void parallel_for(int n, const std::function<void(int)>& task) {
  if (n > 1 && thread_count() > 1 && pool().try_run(n, task)) return;
  for (int i = 0; i < n; ++i) task(i);
}

}  // namespace leankv
