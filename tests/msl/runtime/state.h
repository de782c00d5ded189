// The state of a dispatch. One fiber for each thread of a threadgroup, one threadgroup at a time,
// on one thread of the operating system. The C++ library is not used: PyPI's compiler would have to
// build it first.
#pragma once

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <ucontext.h>

#include "../include/msl/abi.h"

namespace msl {

constexpr int kThreads = 1024, kLanes = 32, kBuffers = 32, kOperand = 64;
constexpr size_t kPage = 4096, kStack = 64 * 1024;
constexpr size_t kThreadgroupMemory = 32 * 1024;  // of an Apple GPU

enum class Order { forward, reverse, random };
enum class Wait : uint8_t { ready, simd, barrier, done };

struct Fiber {
  void* stack_pointer;
  char* stack;  // kStack bytes above a guard page
  ucontext_t context;
  Wait wait;
  int line;  // where it waits
  msl_position at;
};

// What the lanes of a SIMD group hand to each other. Values alternate between two rows, so that a
// lane that runs ahead does not overwrite what another has yet to read.
struct SimdGroup {
  alignas(64) char slots[2][kLanes][kOperand];
  alignas(64) char results[2][kOperand];
  int lanes, arrived;
  uint32_t operations;
  uint32_t barriers;             // simdgroup_barrier with threadgroup memory
  int kind, line, column, lane;  // of the first to arrive
};

struct Buffer {
  char* data;
  size_t bytes;
  bool output;
  const char* name;
  struct DeviceByte* shadow;  // of outputs, in the check build
};

// What a kernel library tells about itself.
struct Library {
  void (*entry)(void* const* buffers, const msl_position& position);
  char* threadgroup_memory;
  char* threadgroup_memory_end;
  char* image;  // the library as it lies in memory: its constants may be read
  char* image_end;
};

struct State {
  Library library;
  Fiber fibers[kThreads];
  SimdGroup groups[kThreads / kLanes];
  int ready[kThreads], ready_count;
  int threads, done, waiting;  // of the current threadgroup
  int barrier_line, barrier_column, barrier_thread;
  Fiber* current;
  void* main_stack_pointer;
  ucontext_t main_context;
  sigjmp_buf fault;
  bool aborting, checking;
  uint32_t epoch, device_epoch;  // barriers of the threadgroup so far, by what they order
  uint32_t first_thread;         // number in the grid of thread 0 of the current threadgroup
  void* const* arguments;
  Buffer buffers[kBuffers];
  int buffer_count;
  Order order;
  int jitter;
  uint64_t random;
  long switches;
};
extern State state;

// Adds a line to the reports of this dispatch.
__attribute__((format(printf, 1, 2))) void report(const char* format, ...);
long reports();
const char* report_text();
void clear_reports();

// Gives up the dispatch; the current fiber never runs again.
void stop();
void run_next();
void switch_to(Fiber* fiber);
void switch_to_main();
void prepare(Fiber* fiber, void (*body)());
void start(Fiber* fiber);
uint64_t draw();

// Checks: see check.cpp.
void start_threadgroup_checks();
void start_device_checks();
void finish_device_checks();

}  // namespace msl
