// Uncompressed rows: reading and writing fp32, fp16 and bf16, and the rotation.
#pragma once

namespace leankv::LEANKV_ISA {

template <Type T>
LEANKV_INLINE vf read_vector(const char* row, int i) {
  const char* at = row + i * size_of(T);
  if constexpr (T == Type::f32) {
    return load<vf>(at);
  } else if constexpr (T == Type::f16) {
    return from_f16(load<vh>(at));
  } else {
    return from_bf16(load<vh>(at));
  }
}

template <Type T>
LEANKV_INLINE void write_vector(char* row, int i, vf x) {
  char* at = row + i * size_of(T);
  if constexpr (T == Type::f32) {
    store(at, x);
  } else if constexpr (T == Type::f16) {
    store(at, to_f16(x));
  } else {
    store(at, to_bf16(x));
  }
}

// The first n of a vector, n <= W.
template <Type T>
LEANKV_INLINE vf read_some(const char* row, int i, int n) {
  if (n == W) return read_vector<T>(row, i);
  char rest[4 * W] = {};
  std::memcpy(rest, row + i * size_of(T), n * size_of(T));
  return read_vector<T>(rest, 0);
}

template <Type T>
LEANKV_INLINE void write_some(char* row, int i, int n, vf x) {
  if (n == W) return write_vector<T>(row, i, x);
  char rest[4 * W];
  write_vector<T>(rest, 0, x);
  std::memcpy(row + i * size_of(T), rest, n * size_of(T));
}

// f(std::integral_constant-like type tag) for a type known at run time.
template <Type T>
struct TypeTag {
  static constexpr Type value = T;
};

template <class F>
LEANKV_INLINE void with_type(Type type, F&& f) {
  switch (type) {
    case Type::f32: return f(TypeTag<Type::f32>{});
    case Type::f16: return f(TypeTag<Type::f16>{});
    case Type::bf16: return f(TypeTag<Type::bf16>{});
  }
}

// head_dims need not be a multiple of W: the rest goes through a padded copy.
inline void read(const Vectors& from, int head, int64_t first, int n, int dim, float* rows) {
  with_type(from.type, [&](auto tag) {
    constexpr Type T = decltype(tag)::value;
    for (int t = 0; t < n; ++t) {
      const char* row = from.row(head, first + t);
      float* to = rows + t * dim;
      const int whole = dim / W * W;
      for (int i = 0; i < whole; i += W) store(to + i, read_vector<T>(row, i));
      if (whole < dim) {
        const vf x = read_some<T>(row, whole, dim - whole);
        std::memcpy(to + whole, &x, 4 * (dim - whole));
      }
    }
  });
}

inline void write(const Output& to, int head, int64_t first, int n, int dim, const float* rows) {
  with_type(to.type, [&](auto tag) {
    constexpr Type T = decltype(tag)::value;
    for (int t = 0; t < n; ++t) {
      char* row = to.row(head, first + t);
      const float* from = rows + t * dim;
      const int whole = dim / W * W;
      for (int i = 0; i < whole; i += W) write_vector<T>(row, i, load(from + i));
      if (whole < dim) {
        float rest[W] = {};
        std::memcpy(rest, from + whole, 4 * (dim - whole));
        write_some<T>(row, whole, dim - whole, load(rest));
      }
    }
  });
}

// Lanes l and l ^ H exchanged.
template <int H>
LEANKV_INLINE vf exchange(vf x) {
#if !defined(__clang__)
  return __builtin_shuffle(x, lane_ids() ^ H);
#elif LEANKV_WIDTH == 4
  return __builtin_shufflevector(x, x, 0 ^ H, 1 ^ H, 2 ^ H, 3 ^ H);
#elif LEANKV_WIDTH == 8
  return __builtin_shufflevector(x, x, 0 ^ H, 1 ^ H, 2 ^ H, 3 ^ H, 4 ^ H, 5 ^ H, 6 ^ H, 7 ^ H);
#else
  return __builtin_shufflevector(x, x, 0 ^ H, 1 ^ H, 2 ^ H, 3 ^ H, 4 ^ H, 5 ^ H, 6 ^ H, 7 ^ H,
                                 8 ^ H, 9 ^ H, 10 ^ H, 11 ^ H, 12 ^ H, 13 ^ H, 14 ^ H, 15 ^ H);
#endif
}

// Butterflies between lanes at distances H, 2H, ... below W: (x, y) -> (x + y, x - y).
template <int H>
LEANKV_INLINE vf within_vector(vf x) {
  if constexpr (H < W) {
    const vf sign = (lane_ids() & H) != 0 ? splat(-1.0f) : splat(1.0f);
    return within_vector<2 * H>(x * sign + exchange<H>(x));
  } else {
    return x;
  }
}

// Orthonormal Walsh-Hadamard transform of each block, in Sylvester's order; blocks are >= 32.
inline void hadamard(float* x, int dim, int block) {
  float scale = 1.0f;
  for (int n = block; n > 1; n /= 4) scale *= n == 2 ? 0.70710678118654752440f : 0.5f;
  for (float* b = x; b < x + dim; b += block) {
    for (int i = 0; i < block; i += W) store(b + i, within_vector<1>(load(b + i)) * scale);
    for (int h = W; h < block; h *= 2) {
      for (int i = 0; i < block; i += 2 * h) {
        for (int j = i; j < i + h; j += W) {
          const vf p = load(b + j), q = load(b + j + h);
          store(b + j, p + q);
          store(b + j + h, p - q);
        }
      }
    }
  }
}

inline void multiply(float* x, const float* y, int n) {
  for (int i = 0; i < n; i += W) store(x + i, load(x + i) * load(y + i));
}

inline void rotate(const Rotation& rotation, float* row) {
  multiply(row, rotation.signs, rotation.dim);
  hadamard(row, rotation.dim, rotation.block);
}

inline void unrotate(const Rotation& rotation, float* row) {
  hadamard(row, rotation.dim, rotation.block);
  multiply(row, rotation.signs, rotation.dim);
}

}  // namespace leankv::LEANKV_ISA
