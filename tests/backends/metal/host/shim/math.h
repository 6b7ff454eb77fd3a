// Mathematical functions, for scalars and, element by element, for vectors. Half and bfloat are computed in float and
// rounded once. The host's functions are right to one unit in the last place. Metal's fast:: functions may be less so.
#pragma once

namespace msl {

template <class T>
constexpr bool is_scalar_float = __is_same(T, float) || __is_same(T, half) || __is_same(T, bfloat);

// f of floats, for scalars or element by element.
template <class F, class T, class... More>
T apply(F f, T x, More... more) {
  using S = typename scalar_of<T>::type;
  static_assert(is_scalar_float<S>, "the function needs float, half or bfloat");
  if constexpr (scalar_of<T>::width == 1) {
    return T(f(float(x), float(more)...));
  } else {
    T y;
    for (int i = 0; i < scalar_of<T>::width; i++) y[i] = S(f(float(x[i]), float(more[i])...));
    return y;
  }
}

}  // namespace msl

namespace metal {

#define MSL_UNARY(NAME, EXPRESSION)                           \
  template <class T>                                          \
  T NAME(T x) {                                               \
    return msl::apply([](float v) { return EXPRESSION; }, x); \
  }
#define MSL_ELEMENTARY                                                              \
  MSL_UNARY(exp, __builtin_expf(v))                                                 \
  MSL_UNARY(exp2, __builtin_exp2f(v))                                               \
  MSL_UNARY(exp10, __builtin_powf(10.0f, v))                                        \
  MSL_UNARY(log, __builtin_logf(v))                                                 \
  MSL_UNARY(log2, __builtin_log2f(v))                                               \
  MSL_UNARY(log10, __builtin_log10f(v))                                             \
  MSL_UNARY(sin, __builtin_sinf(v))                                                 \
  MSL_UNARY(cos, __builtin_cosf(v))                                                 \
  MSL_UNARY(tan, __builtin_tanf(v))                                                 \
  MSL_UNARY(sinh, __builtin_sinhf(v))                                               \
  MSL_UNARY(cosh, __builtin_coshf(v))                                               \
  MSL_UNARY(tanh, __builtin_tanhf(v))                                               \
  MSL_UNARY(asin, __builtin_asinf(v))                                               \
  MSL_UNARY(acos, __builtin_acosf(v))                                               \
  MSL_UNARY(atan, __builtin_atanf(v))                                               \
  MSL_UNARY(sqrt, __builtin_sqrtf(v))                                               \
  MSL_UNARY(rsqrt, 1.0f / __builtin_sqrtf(v))                                       \
  MSL_UNARY(fabs, __builtin_fabsf(v))                                               \
  MSL_UNARY(floor, __builtin_floorf(v))                                             \
  MSL_UNARY(ceil, __builtin_ceilf(v))                                               \
  MSL_UNARY(round, __builtin_roundf(v))                                             \
  MSL_UNARY(rint, __builtin_rintf(v))                                               \
  MSL_UNARY(trunc, __builtin_truncf(v))                                             \
  MSL_UNARY(fract, v - __builtin_floorf(v))                                         \
  template <class T>                                                                \
  T pow(T x, T y) {                                                                 \
    return msl::apply([](float a, float b) { return __builtin_powf(a, b); }, x, y); \
  }                                                                                 \
  template <class T>                                                                \
  T divide(T x, T y) {                                                              \
    return x / y;                                                                   \
  }

MSL_ELEMENTARY
namespace precise {
MSL_ELEMENTARY
}
namespace fast {
MSL_ELEMENTARY
}
#undef MSL_ELEMENTARY
#undef MSL_UNARY

template <class T>
T fma(T a, T b, T c) {
  return msl::apply([](float x, float y, float z) { return __builtin_fmaf(x, y, z); }, a, b, c);
}
template <class T>
T copysign(T x, T y) {
  return msl::apply([](float a, float b) { return __builtin_copysignf(a, b); }, x, y);
}
template <class T>
T fmod(T x, T y) {
  return msl::apply([](float a, float b) { return __builtin_fmodf(a, b); }, x, y);
}

template <class T>
T abs(T x) {
  return __builtin_elementwise_abs(x);
}
template <class T>
T max(T a, T b) {
  return __builtin_elementwise_max(a, b);
}
template <class T>
T min(T a, T b) {
  return __builtin_elementwise_min(a, b);
}
inline bfloat abs(bfloat x) { return bfloat(__builtin_fabsf(float(x))); }
inline bfloat max(bfloat a, bfloat b) { return bfloat(__builtin_fmaxf(float(a), float(b))); }
inline bfloat min(bfloat a, bfloat b) { return bfloat(__builtin_fminf(float(a), float(b))); }
// select(a, b, c) is b where c holds, else a. For vectors, c is the result of comparing vectors.
template <class T, class C>
T select(T a, T b, C c) {
  if constexpr (msl::scalar_of<T>::width == 1)
    return c ? b : a;
  else {
    T y;
    for (int i = 0; i < msl::scalar_of<T>::width; i++) y[i] = c[i] ? b[i] : a[i];
    return y;
  }
}
template <class T>
T max3(T a, T b, T c) {
  return max(max(a, b), c);
}
template <class T>
T min3(T a, T b, T c) {
  return min(min(a, b), c);
}
template <class T>
T fmax(T a, T b) {
  return max(a, b);
}
template <class T>
T fmin(T a, T b) {
  return min(a, b);
}
template <class T>
T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <class T>
T saturate(T x) {
  return clamp(x, T(0), T(1));
}
template <class T>
T mix(T a, T b, T t) {
  return a + (b - a) * t;
}
template <class T>
T step(T edge, T x) {
  return select(T(1), T(0), x < edge);
}
template <class T>
T sign(T x) {
  return x > T(0) ? T(1) : x < T(0) ? T(-1) : T(0) * x;
}

template <class C>
bool any(C c) {
  bool y = false;
  for (int i = 0; i < msl::scalar_of<C>::width; i++) y |= bool(c[i]);
  return y;
}
template <class C>
bool all(C c) {
  bool y = true;
  for (int i = 0; i < msl::scalar_of<C>::width; i++) y &= bool(c[i]);
  return y;
}

template <class V>
auto dot(V a, V b) {
  typename msl::scalar_of<V>::type sum = 0;
  for (int i = 0; i < msl::scalar_of<V>::width; i++) sum += a[i] * b[i];
  return sum;
}
template <class V>
auto length_squared(V a) {
  return dot(a, a);
}
template <class V>
auto length(V a) {
  return sqrt(dot(a, a));
}

template <class T>
bool isnan(T x) {
  return __builtin_isnan(float(x));
}
template <class T>
bool isinf(T x) {
  return __builtin_isinf(float(x));
}
template <class T>
bool isfinite(T x) {
  return __builtin_isfinite(float(x));
}

template <class T>
T popcount(T x) {
  return T(__builtin_popcountll((unsigned long long)x & (~0ull >> (64 - 8 * sizeof(T)))));
}
template <class T>
T clz(T x) {
  return x ? T(__builtin_clzll((unsigned long long)x) - (64 - 8 * sizeof(T))) : T(8 * sizeof(T));
}
template <class T>
T ctz(T x) {
  return x ? T(__builtin_ctzll((unsigned long long)x)) : T(8 * sizeof(T));
}

}  // namespace metal

#define M_PI_F 3.14159265358979323846f
#define M_E_F 2.71828182845904523536f
#define M_SQRT2_F 1.41421356237309504880f
#define M_LOG2E_F 1.44269504088896340736f
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define FLT_MAX 0x1.fffffep127f
#define FLT_MIN 0x1p-126f
#define FLT_EPSILON 0x1p-23f
