// metal_type_traits, and elem_to_loc, the only helper of MLX's preamble that its documentation mentions.
#pragma once

namespace metal {

struct true_type {
  static constexpr bool value = true;
};
struct false_type {
  static constexpr bool value = false;
};
template <bool, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool, class T, class>
struct conditional {
  using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
  using type = F;
};
template <class A, class B>
struct is_same {
  static constexpr bool value = __is_same(A, B);
};
template <class T>
struct is_floating_point {
  static constexpr bool value = msl::is_scalar_float<T>;
};
template <class T>
struct is_integral {
  static constexpr bool value = __is_integral(T);
};

template <bool C, class T = void>
using enable_if_t = typename enable_if<C, T>::type;
template <bool C, class T, class F>
using conditional_t = typename conditional<C, T, F>::type;
template <class A, class B>
constexpr bool is_same_v = __is_same(A, B);
template <class T>
constexpr bool is_floating_point_v = msl::is_scalar_float<T>;
template <class T>
constexpr bool is_integral_v = __is_integral(T);

}  // namespace metal

// The offset of element number `element` of an array with these strides. All are counted in elements.
template <class Offset = long>
Offset elem_to_loc(Offset element, const constant int* shape, const constant long* strides, int dimensions) {
  Offset at = 0;
  for (int d = dimensions; d-- > 0; element /= shape[d]) at += element % shape[d] * Offset(strides[d]);
  return at;
}
