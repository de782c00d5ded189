#include "simd_avx512.h"
// The kernels are templates of the vectors defined above.
#include "kernels.h"

namespace leankv {
extern const Kernels kAvx512 = avx512::kernels("avx512");
}  // namespace leankv
