// A small persistent pool for loops of independent tasks.
//
// Between loops workers sleep on a condition variable, after a short while in which they wait awake
// for one that follows at once. The caller takes part and, when no task is left, waits only for
// those that a worker has already begun, awake at first too. Nobody waits awake unless there is a
// processor for each thread, and then workers are kept off the caller's. So a loop costs little
// even if no worker wakes up in time.
//
// A worker that cannot be made (no memory for its stack, no more threads for this user) is done
// without.
//
// While one thread runs a loop, loops of other threads (of a second MLX stream) run on their own
// thread alone: never more threads than the pool has.
#pragma once

#include <functional>

namespace leankv {

// LEANKV_THREADS, else the processors this process may run on.
int thread_count();

// Whether thread_count() is 1 from now on. For benchmarks; not while anything is evaluated.
void use_one_thread(bool on);

// task(0), ..., task(n - 1), each once, on up to thread_count() threads.
void parallel_for(int n, const std::function<void(int)>& task);

}  // namespace leankv
