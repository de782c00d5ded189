// Between the kernel's side and the runtime: both include this, and nothing of the C library.
#pragma once

struct msl_position {
  unsigned simdgroup_index_in_threadgroup, simdgroups_per_threadgroup;
  unsigned thread_index_in_simdgroup, threads_per_simdgroup, thread_index_in_threadgroup;
  unsigned thread_position_in_grid[3], thread_position_in_threadgroup[3];
  unsigned threadgroup_position_in_grid[3], threadgroups_per_grid[3];
  unsigned threads_per_grid[3], threads_per_threadgroup[3];
};

enum msl_kind { msl_barrier = 1, msl_sum, msl_max, msl_min, msl_and, msl_or, msl_shuffle,
                msl_prefix };

extern "C" {
// Combines the values of n lanes, 64 bytes apart, in the order given; order[32] is 1 if they shall
// be combined one after the other, else in a tree.
typedef void (*msl_combine)(void* slots, void* result, const unsigned char* order, int n);

// Waits for all lanes of the SIMD group, which must come to the same place; returns their values,
// 64 bytes apart, or the combined one.
void* msl_simd_op(const void* value, int bytes, int kind, msl_combine combine, int line, int column);
void msl_threadgroup_barrier(int flags, int line, int column);
unsigned msl_lane();
unsigned msl_lanes();
// x, or a float within so many units in the last place: fast math is not exact on a GPU either.
float msl_jitter(float x, int ulps);
}
