#include "simd_neon.h"
// The kernels are templates of the vectors defined above.
#include "project.h"
