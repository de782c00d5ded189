// In place of MLX's header, which has member functions in several address spaces; only the type is
// needed to compile what comes after it.
#pragma once
#pragma GCC system_header
struct complex64_t {
  float real, imag;
  constexpr complex64_t(float r = 0, float i = 0) : real(r), imag(i) {}
};
template <class T>
struct complex_t : complex64_t {
  using complex64_t::complex64_t;
};
