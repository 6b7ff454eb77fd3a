// simdgroup_matrix<T, 8, 8>: a lane holds two neighbouring elements of one row, in the layout that Apple's GPUs use.
#pragma once

namespace msl {

inline MSL_SHIM unsigned fragment_row(unsigned lane) { return (lane / 4 & 4) + lane / 2 % 4; }
inline MSL_SHIM unsigned fragment_column(unsigned lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
inline MSL_SHIM unsigned fragment_lane(unsigned row, unsigned column) {  // the lane that holds (row, column)
  return (row & 4) * 4 + (column & 4) * 2 + (row & 3) * 2 + (column & 2) / 2;
}

// The element of this lane in memory, and the distance to its right neighbour.
struct fragment_address {
  long first, step;
};
inline MSL_SHIM fragment_address locate(ulong stride, ulong2 origin, bool transpose, const char* file, int line) {
  unsigned lane = msl_current()->lane, row = fragment_row(lane), column = fragment_column(lane);
  if (transpose && (origin.x || origin.y))
    msl_unsupported("a transposed load or store with a matrix origin", file, line);
  if (transpose) return {long(column * stride + row), long(stride)};
  return {long((row + origin.y) * stride + column + origin.x), 1};
}

}  // namespace msl

namespace metal {

template <class T, int Columns, int Rows>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "Metal has only 8 by 8 simdgroup matrices");
  static_assert(msl::is_scalar_float<T>, "a simdgroup matrix holds float, half or bfloat");
  vec<T, 2> elements;
  MSL_SHIM simdgroup_matrix() { elements = T(__builtin_nanf("")); }  // Metal leaves it undefined
  MSL_SHIM explicit simdgroup_matrix(T diagonal) {
    unsigned lane = msl_current()->lane, row = msl::fragment_row(lane), column = msl::fragment_column(lane);
    elements = vec<T, 2>{row == column ? diagonal : T(0), row == column + 1 ? diagonal : T(0)};
  }
  vec<T, 2>& thread_elements() { return elements; }
  const vec<T, 2>& thread_elements() const { return elements; }
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

template <class T, int Columns, int Rows = Columns>
MSL_SHIM simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> m;
  m.elements = value;
  return m;
}

#define MSL_LOAD_STORE(SPACE)                                                                                 \
  template <class T>                                                                                          \
  MSL_SHIM void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& m, const SPACE T* source, ulong stride = 8,  \
                               ulong2 origin = 0, bool transpose = false, MSL_HERE) {                         \
    msl::fragment_address at = msl::locate(stride, origin, transpose, file, line);                            \
    for (int i = 0; i < 2; i++) {                                                                             \
      msl_load((const void*)(source + at.first + i * at.step), sizeof(T), file, line);                        \
      m.elements[i] = source[at.first + i * at.step];                                                         \
    }                                                                                                         \
  }                                                                                                           \
  template <class T>                                                                                          \
  MSL_SHIM void simdgroup_store(const thread simdgroup_matrix<T, 8, 8>& m, SPACE T* target, ulong stride = 8, \
                                ulong2 origin = 0, bool transpose = false, MSL_HERE) {                        \
    msl::fragment_address at = msl::locate(stride, origin, transpose, file, line);                            \
    for (int i = 0; i < 2; i++) {                                                                             \
      msl_store((const void*)(target + at.first + i * at.step), sizeof(T), file, line);                       \
      target[at.first + i * at.step] = m.elements[i];                                                         \
    }                                                                                                         \
  }
MSL_LOAD_STORE(threadgroup)
#ifdef MSL_CHECK_ADDRESS_SPACES
MSL_LOAD_STORE(device)
#endif
#undef MSL_LOAD_STORE

// d = a b + c, accumulated in float.
template <class D, class A, class B, class C>
MSL_SHIM void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d,
                                            const thread simdgroup_matrix<A, 8, 8>& a,
                                            const thread simdgroup_matrix<B, 8, 8>& b,
                                            const thread simdgroup_matrix<C, 8, 8>& c, MSL_HERE) {
  float4 mine = {float(a.elements[0]), float(a.elements[1]), float(b.elements[0]), float(b.elements[1])};
  msl::lanes<float4> all = msl::publish(mine, MSL_MULTIPLY, file, line);
  unsigned lane = msl::this_lane(), row = msl::fragment_row(lane), column = msl::fragment_column(lane);
  float sum[2] = {float(c.elements[0]), float(c.elements[1])};
  for (unsigned k = 0; k < 8; k++) {
    float left = all[msl::fragment_lane(row, k)][k & 1];
    float4 right = all[msl::fragment_lane(k, column)];
    sum[0] += left * right[2];
    sum[1] += left * right[3];
  }
  d.elements = vec<D, 2>{D(sum[0]), D(sum[1])};
}
template <class D, class A, class B>
MSL_SHIM void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d, const thread simdgroup_matrix<A, 8, 8>& a,
                                 const thread simdgroup_matrix<B, 8, 8>& b, MSL_HERE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0)), file, line);
}

}  // namespace metal
