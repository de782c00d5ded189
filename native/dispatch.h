// Which kernels run: the best that this processor executes, or those that LEANKV_CPU_ISA names.
#pragma once

#include <string>
#include <vector>

#include "kernels/args.h"

namespace leankv {

// Names that run here, best first.
std::vector<std::string> available_isas();

// The kernels in use.
const Kernels& kernels();

// Uses the named kernels from now on ("" for the best). Throws std::invalid_argument if they do not
// run here. For tests; not while anything is evaluated.
void select_isa(const std::string& name);

}  // namespace leankv
