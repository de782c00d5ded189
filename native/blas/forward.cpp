// The matrix products that libmlx.so takes from a BLAS, forwarded to OpenBLAS as the package
// scipy-openblas32 brings it, whose symbols carry a prefix. leankv_mlx/blas.py makes this library
// global before mlx.core is loaded: the loader then finds these names before those of the reference
// BLAS beside libmlx.so.
#include <dlfcn.h>

#include <atomic>
#include <cstdint>

namespace {

enum Order { kRowMajor = 101 };
enum Transpose { kNone = 111, kTransposed = 112 };

template <class T>
using Gemm = void (*)(int order, int trans_a, int trans_b, int m, int n, int k, T alpha, const T* a,
                      int lda, const T* b, int ldb, T beta, T* c, int ldc);
template <class T>
using Gemv = void (*)(int order, int trans, int m, int n, T alpha, const T* a, int lda, const T* x,
                      int incx, T beta, T* y, int incy);
using ComplexGemm = void (*)(int order, int trans_a, int trans_b, int m, int n, int k,
                             const void* alpha, const void* a, int lda, const void* b, int ldb,
                             const void* beta, void* c, int ldc);

struct Functions {
  Gemm<float> sgemm = nullptr;
  Gemm<double> dgemm = nullptr;
  ComplexGemm cgemm = nullptr;
  Gemv<float> sgemv = nullptr;
};

Functions openblas;  // written once, before this library is global and anything else sees it
std::atomic<int64_t> calls{0};

template <class F>
bool find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace

#define LEANKV_EXPORT extern "C" __attribute__((visibility("default")))

// Takes the functions of the library at a path; 0 if it is not there or lacks one of them.
LEANKV_EXPORT int leankv_blas_open(const char* path) {
  if (openblas.sgemm) return 1;
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return 0;
  Functions found;
  if (!find(library, "scipy_cblas_sgemm", found.sgemm) ||
      !find(library, "scipy_cblas_dgemm", found.dgemm) ||
      !find(library, "scipy_cblas_cgemm", found.cgemm) ||
      !find(library, "scipy_cblas_sgemv", found.sgemv)) {
    return 0;
  }
  openblas = found;
  return 1;
}

// Products computed so far: whether MLX's go through here.
LEANKV_EXPORT int64_t leankv_blas_products() { return calls.load(std::memory_order_relaxed); }

LEANKV_EXPORT void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k,
                               float alpha, const float* a, int lda, const float* b, int ldb,
                               float beta, float* c, int ldc) {
  calls.fetch_add(1, std::memory_order_relaxed);
  // One row of activations, a decode step: OpenBLAS's general product would copy all weights into
  // its own layout first.
  if (m == 1 && k > 0 && order == kRowMajor && trans_a == kNone) {
    if (trans_b == kTransposed) {
      openblas.sgemv(order, kNone, n, k, alpha, b, ldb, a, 1, beta, c, 1);
    } else {
      openblas.sgemv(order, kTransposed, k, n, alpha, b, ldb, a, 1, beta, c, 1);
    }
    return;
  }
  openblas.sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

LEANKV_EXPORT void cblas_dgemm(int order, int trans_a, int trans_b, int m, int n, int k,
                               double alpha, const double* a, int lda, const double* b, int ldb,
                               double beta, double* c, int ldc) {
  calls.fetch_add(1, std::memory_order_relaxed);
  openblas.dgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

LEANKV_EXPORT void cblas_cgemm(int order, int trans_a, int trans_b, int m, int n, int k,
                               const void* alpha, const void* a, int lda, const void* b, int ldb,
                               const void* beta, void* c, int ldc) {
  calls.fetch_add(1, std::memory_order_relaxed);
  openblas.cgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
