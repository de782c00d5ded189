// What clang calls to round to bfloat on processors without an instruction for it. The compiler's
// own runtime has it in some distributions only.
#include <cstdint>

extern "C" __bf16 __truncsfbf2(float x) {
  uint32_t bits = __builtin_bit_cast(uint32_t, x);
  // To nearest even; a NaN stays one.
  bits = x == x ? bits + 0x7FFFu + ((bits >> 16) & 1u) : bits | 0x400000u;
  return __builtin_bit_cast(__bf16, static_cast<uint16_t>(bits >> 16));
}
