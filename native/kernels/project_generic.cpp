#include "simd_generic.h"
// The kernels are templates of the vectors defined above.
#include "project.h"
