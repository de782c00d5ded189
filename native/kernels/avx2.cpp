#include "simd_avx2.h"
// The kernels are templates of the vectors defined above.
#include "kernels.h"

namespace leankv {
extern const Kernels kAvx2 = avx2::kernels("avx2");
}  // namespace leankv
