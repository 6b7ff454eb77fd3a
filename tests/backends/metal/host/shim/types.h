// Scalars, vectors and conversions.
#pragma once

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using half = _Float16;
#ifdef MSL_CHECK_CONVERSIONS
#include "strict_bfloat.h"
#else
using bfloat = __bf16;
#endif
using float16_t = half;  // MLX's names
using bfloat16_t = bfloat;

constexpr half operator""h(long double x) { return half(x); }
constexpr bfloat operator"" bf(long double x) { return bfloat(float(x)); }

namespace msl {

template <class T, int N>
struct vector_type {
  typedef T type __attribute__((ext_vector_type(N)));
};
template <class T>
struct scalar_of {
  using type = T;
  static constexpr int width = 1;
};
template <class T, int N>
struct scalar_of<T __attribute__((ext_vector_type(N)))> {
  using type = T;
  static constexpr int width = N;
};

#ifdef MSL_CHECK_CONVERSIONS  // clang has no vectors of a class
template <int N>
struct vector_type<bfloat, N> {
  using type = bfloat_vector<N>;
};
template <int N>
struct scalar_of<bfloat_vector<N>> {
  using type = bfloat;
  static constexpr int width = N;
};
#endif

// Writes one element after the other, so that float4(a.xy, b, c) works as in Metal.
template <class V>
struct vector_builder {
  using T = typename scalar_of<V>::type;
  V value;
  int next = 0;
  template <class A>
  constexpr void add(A a) {
    if constexpr (scalar_of<A>::width == 1)
      value[next++] = T(a);
    else
      for (int i = 0; i < scalar_of<A>::width; i++) value[next++] = T(a[i]);
  }
};
template <class T, int N, class... A>
constexpr typename vector_type<T, N>::type make_vector(A... a) {
  using V = typename vector_type<T, N>::type;
  vector_builder<V> b{};
  if constexpr (sizeof...(A) == 1 && (scalar_of<A>::width + ... + 0) == 1)
    return V(T((a, ...)));
  else {
    static_assert((scalar_of<A>::width + ... + 0) == N,
                  "a vector constructor needs one value, or one for each element");
    (b.add(a), ...);
    return b.value;
  }
}

}  // namespace msl

namespace metal {

template <class T, int N>
using vec = typename msl::vector_type<T, N>::type;

template <class To, class From>
To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of the same size");
  return __builtin_bit_cast(To, x);
}

template <class T>
struct numeric_limits;
template <>
struct numeric_limits<float> {
  static constexpr float infinity() { return __builtin_inff(); }
  static constexpr float quiet_NaN() { return __builtin_nanf(""); }
  static constexpr float max() { return 0x1.fffffep127f; }
  static constexpr float lowest() { return -max(); }
  static constexpr float min() { return 0x1p-126f; }
  static constexpr float epsilon() { return 0x1p-23f; }
};
template <>
struct numeric_limits<half> {
  static constexpr half infinity() { return half(__builtin_inff()); }
  static constexpr half quiet_NaN() { return half(__builtin_nanf("")); }
  static constexpr half max() { return half(65504.0f); }
  static constexpr half lowest() { return -max(); }
  static constexpr half min() { return half(0x1p-14f); }
  static constexpr half epsilon() { return half(0x1p-10f); }
};

}  // namespace metal

// clang-format off
#define MSL_VECTORS(T) \
  using T##2 = metal::vec<T, 2>; using T##3 = metal::vec<T, 3>; using T##4 = metal::vec<T, 4>;
MSL_VECTORS(float) MSL_VECTORS(half) MSL_VECTORS(bfloat) MSL_VECTORS(bool)
MSL_VECTORS(char) MSL_VECTORS(short) MSL_VECTORS(int) MSL_VECTORS(long)
MSL_VECTORS(uchar) MSL_VECTORS(ushort) MSL_VECTORS(uint) MSL_VECTORS(ulong)
#undef MSL_VECTORS
    // clang-format on
    using int16_t = short;
using uint16_t = ushort;
using int8_t = signed char;
using uint8_t = uchar;
