#include "processors.h"

#include <sched.h>

namespace leankv {

#ifdef __linux__

namespace {

// Of the thread that asks first, before any was moved.
const cpu_set_t& allowed() {
  static const cpu_set_t set = [] {
    cpu_set_t given;
    if (sched_getaffinity(0, sizeof(given), &given) != 0)
      CPU_ZERO(&given);  // more than a set holds
    return given;
  }();
  return set;
}

}  // namespace

int processors() {
  const int count = CPU_COUNT(&allowed());
  return count ? count : static_cast<int>(std::thread::hardware_concurrency());
}

void stay_on(int i) {
  if (!CPU_COUNT(&allowed())) return;
  int cpu = -1;
  for (int left = i % processors(); left >= 0; --left) {
    while (!CPU_ISSET(++cpu, &allowed())) {
    }
  }
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  sched_setaffinity(0, sizeof(one), &one);
}

void Elsewhere::move() {
  const int here = sched_getcpu();
  if (here == here_ || here < 0 || here >= CPU_SETSIZE || !CPU_ISSET(here, &allowed())) return;
  here_ = here;
  cpu_set_t rest = allowed();
  CPU_CLR(here, &rest);
  for (pthread_t thread : threads_) pthread_setaffinity_np(thread, sizeof(rest), &rest);
}

#else

int processors() { return static_cast<int>(std::thread::hardware_concurrency()); }
void stay_on(int) {}
void Elsewhere::move() {}

#endif

}  // namespace leankv
