// Math. precise:: is exact to the C library; fast:: is off by a few units in the last place if the
// runtime is told so. The default namespace is precise, as a result must not depend on it.
#pragma once
#pragma GCC system_header

#pragma clang attribute push(__attribute__((no_sanitize("thread", "undefined"))), apply_to = function)
namespace metal {

#define MSL_FUNCTION(NAME, BUILTIN, ULPS)                                         \
  namespace precise {                                                             \
  inline float NAME(float x) { return BUILTIN(x); }                               \
  }                                                                               \
  namespace fast {                                                                \
  inline float NAME(float x) { return msl_jitter(BUILTIN(x), ULPS); }             \
  }                                                                               \
  inline float NAME(float x) { return precise::NAME(x); }                         \
  inline half NAME(half x) { return (half)BUILTIN((float)x); }                    \
  inline bfloat NAME(bfloat x) { return (bfloat)BUILTIN((float)x); }
MSL_FUNCTION(exp, __builtin_expf, 3)
MSL_FUNCTION(exp2, __builtin_exp2f, 3)
MSL_FUNCTION(log, __builtin_logf, 3)
MSL_FUNCTION(log2, __builtin_log2f, 3)
MSL_FUNCTION(sqrt, __builtin_sqrtf, 1)
MSL_FUNCTION(tanh, __builtin_tanhf, 5)
MSL_FUNCTION(floor, __builtin_floorf, 0)
MSL_FUNCTION(ceil, __builtin_ceilf, 0)
MSL_FUNCTION(rint, __builtin_rintf, 0)
MSL_FUNCTION(fabs, __builtin_fabsf, 0)
MSL_FUNCTION(abs, __builtin_fabsf, 0)

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float atan2(float a, float b) { return __builtin_atan2f(a, b); }
inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
inline bool isnan(float x) { return x != x; }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline float fmin(float a, float b) { return __builtin_fminf(a, b); }
inline float fmax(float a, float b) { return __builtin_fmaxf(a, b); }
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T select(T a, T b, bool second) {
  return second ? b : a;
}

}  // namespace metal
#pragma clang attribute pop
