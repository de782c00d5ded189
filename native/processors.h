// Which processor a thread runs on. Only Linux lets a program say so; elsewhere these do nothing.
#pragma once

#include <pthread.h>

#include <thread>
#include <vector>

namespace leankv {

// How many this process may run on.
int processors();

// Keeps the calling thread on the i-th of them, counted round.
void stay_on(int i);

// Keeps threads off the processor of whoever wakes them. Linux wakes a thread where it or its waker
// ran last, and on a machine of few processors that are not idle does not look for a better one:
// the worker then takes the processor from its caller, and a loop is as slow as on one thread.
class Elsewhere {
 public:
  void reserve(size_t threads) { threads_.reserve(threads); }
  void add(std::thread& thread) { threads_.push_back(thread.native_handle()); }
  void move();  // before the threads are woken

 private:
  std::vector<pthread_t> threads_;
  int here_ = -1;
};

}  // namespace leankv
