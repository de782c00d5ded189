#include "simd_avx2.h"
// The kernels are templates of the vectors defined above.
#include "project.h"
