#include "simd_generic.h"
// The kernels are templates of the vectors defined above.
#include "kernels.h"

namespace leankv {
extern const Kernels kGeneric = generic::kernels("generic");
}  // namespace leankv
