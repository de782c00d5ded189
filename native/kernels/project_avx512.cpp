#include "simd_avx512.h"
// The kernels are templates of the vectors defined above.
#include "project.h"
