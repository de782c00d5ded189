// One source for three compilers: Apple's Metal compiler, nvcc (or NVRTC), and the test harness,
// which compiles Metal on a CPU (tests/msl). Everything is text that Python puts in front of a
// kernel's body, so these files include nothing. Own names, because `device` and `constant` mean
// something else to nvcc:
//   DEV       device memory               THR      memory of a thread (pointers and references)
//   DEVFN     a function                  CONSTFN  a function that the compiler can evaluate
//   TG_ARRAY  a threadgroup array, only in the body of a kernel; TG_PTR points to one
//   UNROLL    unroll the loop: it indexes registers;  UNROLL1  leave it: code size
// Language: C++14 without lambdas, recursion, static locals and double, as Metal has it. Thread
// attributes have their Metal names and are used only in kernel bodies, where MLX looks for them.

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
#define DEV
#define THR
#define DEVFN __device__ __forceinline__
#define CONSTFN __host__ __device__ __forceinline__ constexpr
#define TG_PTR(T) T*
#define TG_ARRAY(T, name, size) __shared__ __align__(16) T name[size]
#define UNROLL _Pragma("unroll")
#define UNROLL1 _Pragma("unroll 1")
#define LKV_LINEAR_THREAD ((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x)
#define thread_index_in_threadgroup LKV_LINEAR_THREAD
#define thread_index_in_simdgroup (LKV_LINEAR_THREAD & 31u)
#define simdgroup_index_in_threadgroup (LKV_LINEAR_THREAD >> 5)
#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#define threadgroup_barrier(flags) __syncthreads()
#define simdgroup_barrier(flags) __syncwarp()

template <class T>
DEVFN T simd_shuffle(T x, ushort lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
template <class T>
DEVFN T simd_shuffle_xor(T x, ushort mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
DEVFN float simd_sum(float x) {
  for (int mask = 16; mask; mask >>= 1) x += simd_shuffle_xor(x, (ushort)mask);
  return x;
}
DEVFN float simd_max(float x) {
  for (int mask = 16; mask; mask >>= 1) x = fmaxf(x, simd_shuffle_xor(x, (ushort)mask));
  return x;
}
namespace metal {
DEVFN float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
DEVFN float max(float a, float b) { return ::fmaxf(a, b); }
DEVFN float min(float a, float b) { return ::fminf(a, b); }
DEVFN float fabs(float x) { return ::fabsf(x); }
DEVFN float sqrt(float x) { return ::sqrtf(x); }
DEVFN float log2(float x) { return ::log2f(x); }
namespace fast {
DEVFN float exp2(float x) { return ::exp2f(x); }
}  // namespace fast
}  // namespace metal

DEVFN float lkv_float_of_bits(uint bits) { return __uint_as_float(bits); }
DEVFN float lkv_float_of_half_bits(uint bits) {
  return __half2float(__ushort_as_half((ushort)bits));
}
DEVFN uint lkv_half_bits(float x) { return (uint)__half_as_ushort(__float2half_rn(x)); }

// Byte k of x in byte `to` of the float 2^23.
template <int to>
DEVFN float lkv_magic(uint x, int k) {
  return __uint_as_float(__byte_perm(x, 0x4B000000u, to == 0 ? 0x7440 | k : 0x7404 | (k << 4)));
}

// Byte k of x behind the exponent of 0.5. Its highest bit is 0.
DEVFN float lkv_half_magic(uint x, int k) {
  return __uint_as_float(__byte_perm(x, 0x3F000000u, 0x7044 | (k << 8)));
}

// Two words at an even one.
DEVFN void lkv_load_pair(const DEV uint* at, THR uint& low, THR uint& high) {
  const uint2 pair = *reinterpret_cast<const uint2*>(at);
  low = pair.x;
  high = pair.y;
}

// How many lanes before this one say yes; `count` are all that do.
DEVFN int lkv_rank(bool yes, uint lane, THR int& count) {
  const uint votes = __ballot_sync(0xffffffffu, yes);
  count = __popc(votes);
  return __popc(votes & ((1u << lane) - 1u));
}

// The lane with the number in the low B bits of `code`; the hardware ignores the others.
template <int B>
DEVFN float lkv_pick(float x, uint code) {
  return __shfl_sync(0xffffffffu, x, (int)code, 1 << B);
}

#else

#define DEV device
#define THR thread
#define DEVFN inline
#define CONSTFN inline constexpr
#define TG_PTR(T) threadgroup T*
#if defined(MSL_CPU)
// The harness looks after threadgroup memory itself, and unrolling would only cost compile time.
#define TG_ARRAY(T, name, size) MSL_TG_STORAGE threadgroup T name[size]
#define UNROLL
#define UNROLL1
#else
#define TG_ARRAY(T, name, size) threadgroup T name[size]
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL1 _Pragma("clang loop unroll(disable)")
#endif

DEVFN float lkv_float_of_bits(uint bits) { return as_type<float>(bits); }
DEVFN float lkv_float_of_half_bits(uint bits) { return (float)as_type<half>((ushort)bits); }
DEVFN uint lkv_half_bits(float x) { return (uint)as_type<ushort>((half)x); }

template <int to>
DEVFN float lkv_magic(uint x, int k) {
  const int shift = 8 * (k - to);
  const uint byte = (shift < 0 ? x << (shift < 0 ? -shift : 0) : x >> (shift < 0 ? 0 : shift)) &
                    (0xffu << (8 * to));
  return as_type<float>(byte | 0x4B000000u);
}

DEVFN float lkv_half_magic(uint x, int k) {
  const uint byte = k < 2 ? x << (k < 2 ? 16 - 8 * k : 0) : x >> (k < 2 ? 0 : 8 * k - 16);
  return as_type<float>((byte & 0x7F0000u) | 0x3F000000u);
}

DEVFN void lkv_load_pair(const DEV uint* at, THR uint& low, THR uint& high) {
  low = at[0];
  high = at[1];
}

DEVFN int lkv_rank(bool yes, uint lane, THR int& count) {
  count = simd_sum((int)yes);
  return simd_prefix_inclusive_sum((int)yes) - (int)yes;
}

template <int B>
DEVFN float lkv_pick(float x, uint code) {
  return metal::simd_shuffle(x, (ushort)(code & (uint)((1 << B) - 1)));
}

#endif

// Below every score, and finite: fast math may assume that there is no infinity.
#define LKV_NEVER (-1.0e30f)
