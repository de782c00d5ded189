// Barriers and SIMD-group functions. Each knows the line and column where it is called: lanes that
// meet in different places have diverged, which Metal does not allow.
#pragma once
#pragma GCC system_header

#define MSL_PLACE int line = __builtin_LINE(), int column = __builtin_COLUMN()

// What is in here is the hardware, not the kernel: it is not checked.
#pragma clang attribute push(__attribute__((no_sanitize("thread", "undefined"))), apply_to = function)
namespace metal {

enum class mem_flags : int { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((int)a | (int)b); }

inline void threadgroup_barrier(mem_flags flags, MSL_PLACE) {
  msl_threadgroup_barrier((int)flags, line, column);
}
inline void simdgroup_barrier(mem_flags flags, MSL_PLACE) {
  const int value = (int)flags;
  msl_simd_op(&value, sizeof(value), msl_barrier, nullptr, line, column);
}

template <class T>
struct msl_slot {
  alignas(64) T value;
};

template <class T, class F>
inline void msl_reduce(void* slots, void* result, const unsigned char* order, int n) {
  T at[32];
  for (int i = 0; i < n; i++) at[i] = ((msl_slot<T>*)slots)[order[i]].value;
  if (order[32]) {
    for (int i = 1; i < n; i++) at[0] = F::of(at[0], at[i]);
  } else {
    for (int h = 16; h; h >>= 1) {
      for (int i = 0; i < h && i + h < n; i++) at[i] = F::of(at[i], at[i + h]);
    }
  }
  *(T*)result = at[0];
}

#define MSL_REDUCTION(NAME, KIND, EXPRESSION)                                                    \
  struct msl_##NAME##_of {                                                                       \
    template <class T>                                                                           \
    static inline T of(T a, T b) {                                                               \
      return EXPRESSION;                                                                         \
    }                                                                                            \
  };                                                                                             \
  template <class T>                                                                             \
  inline T NAME(T x, MSL_PLACE) {                                                                \
    return *(T*)msl_simd_op(&x, sizeof(T), KIND, msl_reduce<T, msl_##NAME##_of>, line, column);  \
  }
MSL_REDUCTION(simd_sum, msl_sum, a + b)
MSL_REDUCTION(simd_max, msl_max, a > b ? a : b)
MSL_REDUCTION(simd_min, msl_min, a < b ? a : b)
MSL_REDUCTION(simd_and, msl_and, a & b)
MSL_REDUCTION(simd_or, msl_or, a | b)

// The value of another lane; that of a lane which does not exist is undefined, so it is garbage.
template <class T>
inline T msl_from(T x, unsigned lane, int line, int column) {
  msl_slot<T>* slots = (msl_slot<T>*)msl_simd_op(&x, sizeof(T), msl_shuffle, nullptr, line, column);
  if (lane < msl_lanes()) return slots[lane].value;
  __builtin_memset(&x, 0xCB, sizeof(x));
  return x;
}
#define MSL_SHUFFLE(NAME, LANE)                  \
  template <class T>                             \
  inline T NAME(T x, ushort by, MSL_PLACE) {     \
    return msl_from(x, LANE, line, column);      \
  }
MSL_SHUFFLE(simd_shuffle, by)
MSL_SHUFFLE(simd_broadcast, by)
MSL_SHUFFLE(simd_shuffle_xor, msl_lane() ^ by)
MSL_SHUFFLE(simd_shuffle_down, msl_lane() + by)
MSL_SHUFFLE(simd_shuffle_up, msl_lane() - by)
template <class T>
inline T simd_prefix_inclusive_sum(T x, MSL_PLACE) {
  msl_slot<T>* slots = (msl_slot<T>*)msl_simd_op(&x, sizeof(T), msl_prefix, nullptr, line, column);
  T sum = slots[0].value;
  for (unsigned i = 1; i <= msl_lane(); i++) sum += slots[i].value;
  return sum;
}
#define MSL_SHUFFLE_AND_FILL(NAME, LANE)                             \
  template <class T>                                                 \
  inline T NAME(T x, T filling, ushort by, MSL_PLACE) {              \
    const unsigned lane = LANE;                                      \
    const T other = msl_from(x, lane, line, column);                 \
    return lane < msl_lanes() ? other : filling;                     \
  }
MSL_SHUFFLE_AND_FILL(simd_shuffle_and_fill_down, msl_lane() + by)
MSL_SHUFFLE_AND_FILL(simd_shuffle_and_fill_up, msl_lane() - by)

}  // namespace metal
#pragma clang attribute pop
