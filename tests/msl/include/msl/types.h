// Scalars, vectors, address spaces.
#pragma once
#pragma GCC system_header

typedef __UINT8_TYPE__ uint8_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __UINT64_TYPE__ uint64_t;
typedef __INT8_TYPE__ int8_t;
typedef __INT16_TYPE__ int16_t;
typedef __INT32_TYPE__ int32_t;
typedef __INT64_TYPE__ int64_t;
typedef __SIZE_TYPE__ size_t;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;

// These attributes make address spaces part of the type in plain C++, and cost nothing at run time.
#define device __attribute__((opencl_global))
#define constant const __attribute__((opencl_constant))
#define threadgroup __attribute__((opencl_local))
#define thread
#define kernel

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
#define MSL_VECTORS(T) typedef vec<T, 2> T##2; typedef vec<T, 3> T##3; typedef vec<T, 4> T##4;
MSL_VECTORS(float)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(uchar)
MSL_VECTORS(long)
MSL_VECTORS(ulong)

// Metal constructs vectors as uint3(a, b, c), which clang takes for a cast of the last one.
#define uint2(...) uint2{__VA_ARGS__}
#define uint3(...) uint3{__VA_ARGS__}
#define float2(...) float2{__VA_ARGS__}
#define float4(...) float4{__VA_ARGS__}

template <class To, class From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of different sizes");
  return __builtin_bit_cast(To, from);
}

namespace metal {
template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <class T, class U>
constexpr bool is_same_v = __is_same(T, U);
template <class T>
constexpr bool is_integral_v = __is_integral(T);
template <class T>
constexpr bool is_floating_point_v = __is_floating_point(T) || __is_same(T, half) || __is_same(T, bfloat);

template <class T>
struct numeric_limits {
  static constexpr T max() { return T(~T(0)) > T(0) ? T(~T(0)) : T((1ull << (8 * sizeof(T) - 1)) - 1); }
  static constexpr T min() { return T(~T(0)) > T(0) ? T(0) : T(1ull << (8 * sizeof(T) - 1)); }
};
#define MSL_FLOAT_LIMITS(T, LARGEST)                                        \
  template <>                                                               \
  struct numeric_limits<T> {                                                \
    static constexpr T infinity() { return (T)__builtin_inff(); }           \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); }        \
    static constexpr T max() { return (T)LARGEST; }                         \
    static constexpr T lowest() { return (T)(-LARGEST); }                   \
  };
MSL_FLOAT_LIMITS(float, 3.402823466e38f)
MSL_FLOAT_LIMITS(half, 65504.0f)
MSL_FLOAT_LIMITS(bfloat, 3.3895313892515355e38f)
}  // namespace metal
