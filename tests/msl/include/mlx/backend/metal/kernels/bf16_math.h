// In place of MLX's header, whose functions are Apple's internal ones: ours are in msl/math.h.
#pragma once
