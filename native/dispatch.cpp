#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace leankv {
namespace {

std::vector<const Kernels*> find_kernels() {
  std::vector<const Kernels*> found;
#if defined(LEANKV_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back(&kAvx512);
  }
  if (avx2) found.push_back(&kAvx2);
#elif defined(LEANKV_NEON)
  found.push_back(&kNeon);
#endif
  found.push_back(&kGeneric);
  return found;
}

const Kernels* find(const std::string& name) {
  const auto found = find_kernels();
  if (name.empty()) return found[0];
  std::string names;
  for (const Kernels* k : found) {
    if (name == k->name) return k;
    names += std::string(names.empty() ? "" : ", ") + k->name;
  }
  throw std::invalid_argument("instruction set '" + name + "' does not run here; use one of " +
                              names + ".");
}

std::atomic<const Kernels*>& selected() {
  static std::atomic<const Kernels*> kernels = [] {
    const char* name = std::getenv("LEANKV_CPU_ISA");
    return find(name ? name : "");
  }();
  return kernels;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* k : find_kernels()) names.push_back(k->name);
  return names;
}

const Kernels& kernels() { return *selected().load(std::memory_order_relaxed); }

void select_isa(const std::string& name) { selected().store(find(name)); }

}  // namespace leankv
