#include "simd_neon.h"
// The kernels are templates of the vectors defined above.
#include "kernels.h"

namespace leankv {
extern const Kernels kNeon = neon::kernels("neon");
}  // namespace leankv
