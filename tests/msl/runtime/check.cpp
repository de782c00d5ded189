// Every access to memory in the check build: the compiler calls the functions of the thread
// sanitizer, and they are these.
//
// Threadgroup memory: two accesses to a byte, one of them a write, by two threads are a race
// unless a threadgroup barrier lies between them, or, within a SIMD group, a SIMD-group barrier.
// Bytes must be written before they are read. Device memory: inputs are not written; a byte of
// an output is written by one thread, in the end by someone, and read by others only behind a
// barrier.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "state.h"

namespace msl {

// Threads are numbered from 1, so that 0 is nobody.
struct ThreadgroupByte {
  uint32_t write_epoch, write_barriers;
  uint32_t read_epoch, read_barriers;
  uint16_t writer, reader;
  uint8_t readers;  // 0 one thread, 1 several of a SIMD group, 2 several SIMD groups
  bool written;
};

struct DeviceByte {
  uint32_t writer, epoch;
};

static ThreadgroupByte shadow[kThreadgroupMemory];

void start_threadgroup_checks() {
  if (state.checking) memset(shadow, 0, sizeof(shadow));
}

void start_device_checks() {
  for (int i = 0; i < state.buffer_count && state.checking; i++) {
    Buffer& b = state.buffers[i];
    if (b.output) b.shadow = static_cast<DeviceByte*>(calloc(b.bytes + 1, sizeof(DeviceByte)));
  }
}

void finish_device_checks() {
  for (int i = 0; i < state.buffer_count; i++) {
    Buffer& b = state.buffers[i];
    if (!b.shadow) continue;
    size_t missing = 0, first = 0;
    for (size_t k = 0; k < b.bytes; k++) {
      if (b.shadow[k].writer) continue;
      if (!missing++) first = k;
    }
    if (missing) {
      report("UNWRITTEN output %s: %zu of %zu bytes, the first at %zu", b.name, missing, b.bytes,
             first);
    }
    free(b.shadow);
    b.shadow = nullptr;
  }
}

// "@0x..." in the library: Python turns it into a line of the kernel.
static const char* where(void* address) {
  static char place[64];
  Dl_info info;
  if (!dladdr(address, &info)) return "";
  const char* base = static_cast<char*>(info.dli_fbase);
  snprintf(place, sizeof(place), "@0x%tx", static_cast<char*>(address) - 1 - base);
  return place;
}

static int simd_group_of(int thread) { return (thread - 1) / kLanes; }

static void threadgroup_access(size_t at, size_t bytes, bool write, void* address) {
  const int group = state.current->at.simdgroup_index_in_threadgroup;
  const uint16_t self = state.current->at.thread_index_in_threadgroup + 1;
  const uint32_t barriers = state.groups[group].barriers;
  for (size_t i = at; i < at + bytes && i < kThreadgroupMemory; i++) {
    ThreadgroupByte& b = shadow[i];
    if (!write && !b.written) {
      report("UNINITIALISED threadgroup byte %zu read by thread %d %s", i, self - 1,
             where(address));
      b.written = true;
    }
    const bool same_group = b.writer && simd_group_of(b.writer) == group;
    if (b.writer && b.writer != self && b.write_epoch == state.epoch &&
        !(same_group && b.write_barriers < barriers)) {
      report("RACE on threadgroup byte %zu: written by thread %d, %s by thread %d %s", i,
             b.writer - 1, write ? "written" : "read", self - 1, where(address));
      b.writer = 0;
    }
    if (write) {
      const bool ordered = b.readers < 2 && b.reader && simd_group_of(b.reader) == group &&
                           b.read_barriers < barriers;
      if (b.reader && (b.reader != self || b.readers) && b.read_epoch == state.epoch && !ordered) {
        report("RACE on threadgroup byte %zu: read by thread %d, written by thread %d %s", i,
               b.reader - 1, self - 1, where(address));
        b.reader = 0;
      }
      b.write_epoch = state.epoch;
      b.write_barriers = barriers;
      b.writer = self;
      b.written = true;
    } else {
      if (b.read_epoch != state.epoch || !b.reader) {
        b.read_epoch = state.epoch;
        b.reader = self;
        b.readers = 0;
      } else if (b.reader != self) {
        b.readers = simd_group_of(b.reader) != group || b.readers == 2 ? 2 : 1;
      }
      b.read_barriers = barriers;
    }
  }
}

static void output_access(Buffer& buffer, size_t at, size_t bytes, bool write, void* address) {
  const uint32_t self = state.first_thread + state.current->at.thread_index_in_threadgroup + 1;
  const uint32_t group_end = state.first_thread + state.threads;
  for (size_t i = at; i < at + bytes; i++) {
    DeviceByte& b = buffer.shadow[i];
    const bool behind_barrier =
        b.writer > state.first_thread && b.writer <= group_end && b.epoch < state.device_epoch;
    if (b.writer && b.writer != self && !behind_barrier) {
      report("RACE on byte %zu of %s: written by thread %u of the grid, %s by thread %u %s", i,
             buffer.name, b.writer - 1, write ? "written" : "read", self - 1, where(address));
    } else if (!b.writer && !write) {
      report("UNINITIALISED byte %zu of output %s read %s", i, buffer.name, where(address));
    }
    if (write) b = {self, state.device_epoch};
  }
}

static void out_of_bounds(char* at, size_t bytes, bool write, void* address) {
  const msl_position& p = state.current->at;
  report("OUT OF BOUNDS %s of %zu bytes, thread %u of threadgroup (%u, %u, %u) %s",
         write ? "write" : "read", bytes, p.thread_index_in_threadgroup,
         p.threadgroup_position_in_grid[0], p.threadgroup_position_in_grid[1],
         p.threadgroup_position_in_grid[2], where(address));
  for (int i = 0; i < state.buffer_count; i++) {
    const Buffer& b = state.buffers[i];
    if (at >= b.data - kPage && at < b.data + b.bytes + kPage) {
      report("   at byte %td of the %zu of %s", at - b.data, b.bytes, b.name);
    }
  }
  stop();
}

static void access(char* at, size_t bytes, bool write, void* address) {
  if (!state.checking) return;
  if (at >= state.current->stack && at + bytes <= state.current->stack + kStack) return;
  const Library& library = state.library;
  if (at >= library.threadgroup_memory && at + bytes <= library.threadgroup_memory_end) {
    threadgroup_access(at - library.threadgroup_memory, bytes, write, address);
    return;
  }
  for (int i = 0; i < state.buffer_count; i++) {
    Buffer& b = state.buffers[i];
    if (at < b.data || at + bytes > b.data + b.bytes) continue;
    if (b.shadow) {
      output_access(b, at - b.data, bytes, write, address);
    } else if (write) {
      report("WRITE to input %s %s", b.name, where(address));
    }
    return;
  }
  if (!write && at >= library.image && at < library.image_end) return;
  out_of_bounds(at, bytes, write, address);
}

}  // namespace msl

using msl::access;
#define CALLER __builtin_return_address(0)
#define BYTES(n)                                                                              \
  extern "C" void __tsan_read##n(void* at) { access((char*)at, n, false, CALLER); }           \
  extern "C" void __tsan_write##n(void* at) { access((char*)at, n, true, CALLER); }           \
  extern "C" void __tsan_unaligned_read##n(void* at) { access((char*)at, n, false, CALLER); } \
  extern "C" void __tsan_unaligned_write##n(void* at) { access((char*)at, n, true, CALLER); }
BYTES(1)
BYTES(2)
BYTES(4)
BYTES(8)
BYTES(16)
extern "C" void __tsan_init() {}
extern "C" void __tsan_read_range(void* at, size_t n) { access((char*)at, n, false, CALLER); }
extern "C" void __tsan_write_range(void* at, size_t n) { access((char*)at, n, true, CALLER); }
extern "C" void* __tsan_memcpy(void* to, const void* from, size_t n) {
  access((char*)from, n, false, CALLER);
  access((char*)to, n, true, CALLER);
  return memcpy(to, from, n);
}
extern "C" void* __tsan_memmove(void* to, const void* from, size_t n) {
  access((char*)from, n, false, CALLER);
  access((char*)to, n, true, CALLER);
  return memmove(to, from, n);
}
extern "C" void* __tsan_memset(void* to, int byte, size_t n) {
  access((char*)to, n, true, CALLER);
  return memset(to, byte, n);
}

// Undefined behaviour: the handlers of the compiler's other sanitizer get the place first.
struct Place {
  const char* file;
  uint32_t line, column;
};
extern "C" void __ubsan_handle_local_out_of_bounds() {  // gets no place
  msl::report("UNDEFINED local_out_of_bounds");
  msl::stop();
}
#define UNDEFINED(name)                                                           \
  extern "C" void __ubsan_handle_##name(Place* place, ...) {                      \
    msl::report("UNDEFINED " #name " in line %u:%u", place->line, place->column); \
    msl::stop();                                                                  \
  }
UNDEFINED(out_of_bounds)
UNDEFINED(shift_out_of_bounds)
UNDEFINED(add_overflow)
UNDEFINED(sub_overflow)
UNDEFINED(mul_overflow)
UNDEFINED(negate_overflow)
UNDEFINED(divrem_overflow)
UNDEFINED(float_cast_overflow)
