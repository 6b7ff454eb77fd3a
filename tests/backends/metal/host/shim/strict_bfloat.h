// bfloat with Metal's conversions, for the build that only checks them. A bfloat becomes a float implicitly. To make a
// bfloat of another number, or a half of a bfloat, takes a cast.
#pragma once

struct bfloat {
  unsigned short bits;
  bfloat() = default;
  template <class T>
  constexpr explicit bfloat(T x) : bits(__builtin_bit_cast(unsigned, float(x)) >> 16) {}
  template <class T, class = T[__is_same(T, float) ? 1 : -1]>
  constexpr operator T() const {
    return __builtin_bit_cast(float, bits << 16);
  }
  template <class T, class = void, class = T[__is_same(T, float) ? -1 : 1]>
  constexpr explicit operator T() const {
    return T(float(*this));
  }
};
constexpr bfloat operator-(bfloat a) { return bfloat(-float(a)); }
#define MSL_OPERATOR(op)                                                                    \
  constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); } \
  inline bfloat& operator op## = (bfloat & a, bfloat b) { return a = a op b; }
MSL_OPERATOR(+)
MSL_OPERATOR(-) MSL_OPERATOR(*) MSL_OPERATOR(/)
#undef MSL_OPERATOR

    template <int N>
    struct bfloat_vector {
  bfloat element[N];
  bfloat& operator[](int i) { return element[i]; }
  const bfloat& operator[](int i) const { return element[i]; }
  bfloat_vector& operator=(bfloat x) {
    for (bfloat& e : element) e = x;
    return *this;
  }
};
