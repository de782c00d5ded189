// Runs a grid, one threadgroup after the other.
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "state.h"

namespace msl {

void wake_all();

static char text[8192];
static long count;
constexpr int kShown = 12;

void report(const char* format, ...) {
  if (++count > kShown) return;
  const size_t used = strlen(text);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text + used, sizeof(text) - used - 1, format, arguments);
  va_end(arguments);
  strcat(text, "\n");
}
long reports() { return count; }
const char* report_text() { return text; }
void clear_reports() {
  text[0] = 0;
  count = 0;
}

static void body() {
  for (;;) {
    state.library.entry(state.arguments, state.current->at);
    state.current->wait = Wait::done;
    state.done++;
    run_next();
  }
}

// The fast build has no checks, but buffers end at a page that cannot be touched.
static void on_fault(int, siginfo_t* info, void*) {
  const char* at = static_cast<char*>(info->si_addr);
  const msl_position& p = state.current->at;
  report("FAULT at %p, thread %u of threadgroup (%u, %u, %u)", info->si_addr,
         p.thread_index_in_threadgroup, p.threadgroup_position_in_grid[0],
         p.threadgroup_position_in_grid[1], p.threadgroup_position_in_grid[2]);
  for (int i = 0; i < state.buffer_count; i++) {
    const Buffer& b = state.buffers[i];
    if (at >= b.data - kPage && at < b.data + b.bytes + 2 * kPage) {
      report("   at byte %td of the %zu of %s", at - b.data, b.bytes, b.name);
    }
  }
  const char* stack = state.current->stack;
  if (at >= stack - kPage && at < stack) report("   the stack of the thread is full");
  siglongjmp(state.fault, 1);
}

struct Extent {
  uint32_t threads[3], groups[3];
};

static void place(const uint32_t* grid, const uint32_t* threadgroup, const Extent& extent,
                  uint32_t group) {
  const uint32_t at[3] = {group % extent.groups[0], group / extent.groups[0] % extent.groups[1],
                          group / extent.groups[0] / extent.groups[1]};
  uint32_t size[3];  // smaller at the edge of the grid
  for (int d = 0; d < 3; d++) {
    const uint32_t left = grid[d] - at[d] * threadgroup[d];
    size[d] = left < threadgroup[d] ? left : threadgroup[d];
  }
  state.threads = size[0] * size[1] * size[2];
  const int groups = (state.threads + kLanes - 1) / kLanes;
  for (int g = 0; g < groups; g++) {
    SimdGroup& simd = state.groups[g];
    const int left = state.threads - g * kLanes;
    simd.lanes = left < kLanes ? left : kLanes;
    simd.arrived = 0;
    simd.operations = simd.barriers = 0;
  }
  for (int i = 0; i < state.threads; i++) {
    Fiber& fiber = state.fibers[i];
    msl_position& p = fiber.at;
    const uint32_t inside[3] = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
    p.simdgroup_index_in_threadgroup = i / kLanes;
    p.simdgroups_per_threadgroup = groups;
    p.thread_index_in_simdgroup = i % kLanes;
    p.threads_per_simdgroup = kLanes;
    p.thread_index_in_threadgroup = i;
    for (int d = 0; d < 3; d++) {
      p.thread_position_in_threadgroup[d] = inside[d];
      p.threadgroup_position_in_grid[d] = at[d];
      p.thread_position_in_grid[d] = at[d] * threadgroup[d] + inside[d];
      p.threadgroups_per_grid[d] = extent.groups[d];
      p.threads_per_grid[d] = grid[d];
      p.threads_per_threadgroup[d] = size[d];
    }
    fiber.wait = Wait::ready;
    prepare(&fiber, body);
  }
}

static void run_threadgroup() {
  const Library& library = state.library;
  memset(library.threadgroup_memory, 0xCB,
         library.threadgroup_memory_end - library.threadgroup_memory);
  state.epoch = state.device_epoch = 1;
  state.done = state.waiting = state.ready_count = 0;
  start_threadgroup_checks();
  wake_all();
  const int last = --state.ready_count;
  int first = state.ready[last];
  if (state.order == Order::random) {
    const int at = static_cast<int>(draw() % (last + 1));
    first = state.ready[at];
    state.ready[at] = state.ready[last];
  }
  start(&state.fibers[first]);
  if (state.aborting || state.done == state.threads) return;
  for (int i = 0; i < state.threads; i++) {
    const Fiber& fiber = state.fibers[i];
    if (fiber.wait == Wait::done) continue;
    report("DEADLOCK: %d of %d threads came to the end, thread %d waits at a %s in line %d",
           state.done, state.threads, i, fiber.wait == Wait::barrier ? "barrier" : "SIMD operation",
           fiber.line);
    state.aborting = true;
    return;
  }
}

static void run_grid(const uint32_t* grid, const uint32_t* asked) {
  uint32_t threadgroup[3];
  Extent extent;
  uint32_t total = 1;
  for (int d = 0; d < 3; d++) {
    threadgroup[d] = asked[d] < grid[d] ? asked[d] : grid[d];
    extent.groups[d] = (grid[d] + threadgroup[d] - 1) / threadgroup[d];
    total *= extent.groups[d];
  }
  const uint32_t threads = threadgroup[0] * threadgroup[1] * threadgroup[2];
  if (threads > kThreads) {
    report("a threadgroup of %u threads is larger than %d", threads, kThreads);
    return;
  }
  uint32_t* order = static_cast<uint32_t*>(malloc(total * sizeof(uint32_t)));
  for (uint32_t i = 0; i < total; i++) order[i] = state.order == Order::reverse ? total - 1 - i : i;
  if (state.order == Order::random) {
    for (uint32_t i = total; i > 1; i--) {
      const uint32_t j = draw() % i, swap = order[i - 1];
      order[i - 1] = order[j];
      order[j] = swap;
    }
  }
  for (uint32_t i = 0; i < total && !state.aborting; i++) {
    state.first_thread = order[i] * threads;
    place(grid, threadgroup, extent, order[i]);
    run_threadgroup();
  }
  free(order);
}

static void guarded(const uint32_t* grid, const uint32_t* threadgroup) {
  static char stack[64 * 1024];
  const stack_t alternative = {.ss_sp = stack, .ss_flags = 0, .ss_size = sizeof(stack)};
  stack_t previous_stack;
  struct sigaction action = {}, segv, bus;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaltstack(&alternative, &previous_stack);
  sigaction(SIGSEGV, &action, &segv);
  sigaction(SIGBUS, &action, &bus);
  if (!sigsetjmp(state.fault, 1)) run_grid(grid, threadgroup);
  sigaction(SIGSEGV, &segv, nullptr);
  sigaction(SIGBUS, &bus, nullptr);
  sigaltstack(&previous_stack, nullptr);
}

}  // namespace msl

using namespace msl;

// Memory that ends (up to 15 bytes) before a page that cannot be touched, with one in front too.
extern "C" void* msl_allocate(size_t bytes) {
  const size_t body = (bytes + kPage - 1) / kPage * kPage;
  char* memory = static_cast<char*>(
      mmap(nullptr, body + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (memory == MAP_FAILED) return nullptr;
  if (mprotect(memory + kPage, body, PROT_READ | PROT_WRITE)) return nullptr;
  return memory + kPage + body - (bytes + 15) / 16 * 16;
}

extern "C" void msl_free(void* data, size_t bytes) {
  const size_t body = (bytes + kPage - 1) / kPage * kPage;
  char* end = static_cast<char*>(data) + (bytes + 15) / 16 * 16;
  munmap(end - body - kPage, body + 2 * kPage);
}

// Returns the number of reports; their text goes to `messages`.
extern "C" long msl_dispatch(const Library* library, void* const* data, int n, const size_t* bytes,
                             const int* outputs, const char* const* names, const uint32_t* grid,
                             const uint32_t* threadgroup, int order, uint64_t seed, int jitter,
                             int check, char* messages, size_t capacity) {
  clear_reports();
  state.order = static_cast<Order>(order);
  state.random = seed * 2654435761u + 88172645463325252ull;
  state.jitter = jitter;
  state.checking = check;
  state.aborting = false;
  state.switches = 0;
  state.arguments = data;
  state.buffer_count = n;
  for (int i = 0; i < n; i++) {
    state.buffers[i] = {static_cast<char*>(data[i]), bytes[i], outputs[i] != 0, names[i], nullptr};
  }
  state.library = *library;
  const size_t used = library->threadgroup_memory_end - library->threadgroup_memory;
  if (used > kThreadgroupMemory) report("%zu bytes of threadgroup memory are too many", used);
  start_device_checks();
  guarded(grid, threadgroup);
  finish_device_checks();
  if (reports() > kShown) report("...");
  snprintf(messages, capacity, "%s", report_text());
  return reports();
}
