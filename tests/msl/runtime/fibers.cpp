// Fibers, the order in which they run, SIMD operations and barriers.
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "state.h"

namespace msl {

State state;

// Switching by hand costs a few nanoseconds, swapcontext a system call.
#if defined(__x86_64__) && !defined(MSL_UCONTEXT)
#define MSL_ASSEMBLY 1
extern "C" void msl_switch(void** save, void* to);
asm(".globl msl_switch\n.hidden msl_switch\nmsl_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    " mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
#endif

void prepare(Fiber* fiber, void (*body)()) {
  if (!fiber->stack) {
    void* memory =
        mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) abort();
    mprotect(memory, kPage, PROT_NONE);
    fiber->stack = static_cast<char*>(memory) + kPage;
  }
#if MSL_ASSEMBLY
  void** top = reinterpret_cast<void**>(fiber->stack + kStack - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(body);
  for (int i = 0; i < 6; i++) *--top = nullptr;  // the registers that msl_switch restores
  fiber->stack_pointer = top;
#else
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, body, 0);
#endif
}

void switch_to(Fiber* fiber) {
  Fiber* previous = state.current;
  if (fiber == previous) return;
  state.current = fiber;
  state.switches++;
#if MSL_ASSEMBLY
  msl_switch(&previous->stack_pointer, fiber->stack_pointer);
#else
  swapcontext(&previous->context, &fiber->context);
#endif
}

void switch_to_main() {
  Fiber* previous = state.current;
#if MSL_ASSEMBLY
  msl_switch(&previous->stack_pointer, state.main_stack_pointer);
#else
  swapcontext(&previous->context, &state.main_context);
#endif
}

void start(Fiber* fiber) {
  state.current = fiber;
#if MSL_ASSEMBLY
  msl_switch(&state.main_stack_pointer, fiber->stack_pointer);
#else
  swapcontext(&state.main_context, &fiber->context);
#endif
}

uint64_t draw() {
  state.random ^= state.random << 13;
  state.random ^= state.random >> 7;
  state.random ^= state.random << 17;
  return state.random;
}

void stop() {
  state.aborting = true;
  switch_to_main();
}

// When none is ready the threadgroup is finished, or will never be.
void run_next() {
  if (!state.ready_count || state.aborting) {
    switch_to_main();
    return;
  }
  const int last = state.ready_count - 1;
  const int at = state.order == Order::random ? static_cast<int>(draw() % state.ready_count) : last;
  Fiber* next = &state.fibers[state.ready[at]];
  state.ready[at] = state.ready[last];
  state.ready_count = last;
  next->wait = Wait::ready;
  switch_to(next);
}

// Makes threads first..last-1 ready, so that they run in the order asked for. The one that wakes
// the others goes on itself, but in random order, where it queues as well.
static void wake(int first, int last, int self) {
  const bool queue_self = state.order == Order::random;
  for (int i = 0; i < last - first; i++) {
    // The list is taken from its end.
    const int thread = state.order == Order::reverse ? first + i : last - 1 - i;
    if (state.fibers[thread].wait == Wait::done || (thread == self && !queue_self)) continue;
    state.fibers[thread].wait = Wait::ready;
    state.ready[state.ready_count++] = thread;
  }
  if (self >= 0 && queue_self) run_next();
}

void wake_all() { wake(0, state.threads, -1); }

static void combine(SimdGroup& group, int row, msl_combine function) {
  unsigned char order[kLanes + 1];
  for (int i = 0; i < kLanes; i++) order[i] = static_cast<unsigned char>(i);
  order[kLanes] = state.order != Order::forward;
  if (state.order == Order::random) {
    for (int i = group.lanes - 1; i > 0; i--) {
      const int j = static_cast<int>(draw() % (i + 1));
      const unsigned char swap = order[i];
      order[i] = order[j];
      order[j] = swap;
    }
  }
  function(group.slots[row], group.results[row], order, group.lanes);
}

}  // namespace msl

using namespace msl;

extern "C" void* msl_simd_op(const void* value, int bytes, int kind, msl_combine function, int line,
                             int column) {
  Fiber* self = state.current;
  const int number = self->at.simdgroup_index_in_threadgroup;
  SimdGroup& group = state.groups[number];
  const int row = group.operations & 1, lane = self->at.thread_index_in_simdgroup;
  memcpy(group.slots[row][lane], value, bytes);
  self->line = line;
  if (!group.arrived) {
    group.kind = kind;
    group.line = line;
    group.column = column;
    group.lane = lane;
  } else if (group.kind != kind || group.line != line || group.column != column) {
    report("DIVERGENT simd operation: lane %d at line %d:%d, lane %d at line %d:%d", group.lane,
           group.line, group.column, lane, line, column);
    stop();
  }
  if (++group.arrived == group.lanes) {
    group.arrived = 0;
    group.operations++;
    if (kind == msl_barrier && *static_cast<const int*>(value) & 2) group.barriers++;
    if (function) combine(group, row, function);
    wake(number * kLanes, number * kLanes + group.lanes, number * kLanes + lane);
  } else {
    self->wait = Wait::simd;
    run_next();
  }
  return function ? group.results[row] : static_cast<void*>(group.slots[row]);
}

extern "C" void msl_threadgroup_barrier(int flags, int line, int column) {
  Fiber* self = state.current;
  const int thread = self->at.thread_index_in_threadgroup;
  self->line = line;
  if (!state.waiting) {
    state.barrier_line = line;
    state.barrier_column = column;
    state.barrier_thread = thread;
  } else if (state.barrier_line != line || state.barrier_column != column) {
    report("DIVERGENT barrier: thread %d at line %d, thread %d at line %d", state.barrier_thread,
           state.barrier_line, thread, line);
    stop();
  }
  if (++state.waiting == state.threads) {
    state.waiting = 0;
    if (flags & 2) state.epoch++;
    if (flags & 1) state.device_epoch++;
    wake(0, state.threads, thread);
  } else {
    self->wait = Wait::barrier;
    run_next();
  }
}

extern "C" unsigned msl_lane() { return state.current->at.thread_index_in_simdgroup; }

extern "C" unsigned msl_lanes() {
  return state.groups[state.current->at.simdgroup_index_in_threadgroup].lanes;
}

extern "C" float msl_jitter(float x, int ulps) {
  if (!state.jitter || !ulps || !isfinite(x) || x == 0.0f) return x;
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  // A function of x alone: the same on every thread, as it is on a GPU.
  const uint64_t hash = (bits + static_cast<uint64_t>(state.jitter)) * 0x9E3779B97F4A7C15ull;
  bits += static_cast<int>((hash >> 40) % (2 * ulps + 1)) - ulps;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
