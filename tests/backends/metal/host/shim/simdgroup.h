// Barriers, and the operations by which the 32 threads of a simdgroup exchange values. All threads must reach the same
// call. This is stricter than Metal, which lets inactive threads skip some of them.
#pragma once

namespace msl {

// What the lanes have published: 32 bytes each. They are all ones (a NaN) for a lane that does not exist.
template <class T>
struct lanes {
  const char* slots;
  MSL_SHIM T operator[](unsigned lane) const { return *(const T*)(slots + lane % 32 * 32); }
};
template <class T>
MSL_SHIM lanes<T> publish(T x, int operation, const char* file, int line) {
  static_assert(sizeof(T) <= 32);
  return {msl_exchange(&x, sizeof x, operation, file, line)};
}
inline MSL_SHIM unsigned this_lane() { return msl_current()->lane; }
inline MSL_SHIM unsigned lane_count() {
  unsigned left =
      msl_current()->threads_per_group[0] * msl_current()->threads_per_group[1] * msl_current()->threads_per_group[2] -
      msl_current()->simdgroup * 32;
  return left < 32 ? left : 32;
}

// Reductions add neighbours, then pairs of neighbours. Metal leaves the order open.
template <class T, class Combine>
MSL_SHIM T reduce(lanes<T> all, unsigned first, unsigned count, Combine combine) {
  T x[32];
  for (unsigned i = 0; i < count; i++) x[i] = all[first + i];
  for (unsigned step = 1; step < count; step *= 2)
    for (unsigned i = 0; i + step < count; i += 2 * step) x[i] = combine(x[i], x[i + step]);
  return x[0];
}

}  // namespace msl

namespace metal {

enum class mem_flags {
  mem_none = 0,
  mem_threadgroup = MSL_SPACE_THREADGROUP,
  mem_device = MSL_SPACE_DEVICE,
  mem_texture = 4
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

inline void threadgroup_barrier(mem_flags flags, MSL_HERE) { msl_barrier(MSL_THREADGROUP, int(flags), file, line); }
inline void simdgroup_barrier(mem_flags flags, MSL_HERE) { msl_barrier(MSL_SIMDGROUP, int(flags), file, line); }

template <class T>
MSL_SHIM T simd_shuffle(T x, ushort lane, MSL_HERE) {
  return msl::publish(x, MSL_SHUFFLE, file, line)[lane];
}
template <class T>
MSL_SHIM T simd_shuffle_xor(T x, ushort mask, MSL_HERE) {
  return msl::publish(x, MSL_SHUFFLE, file, line)[msl::this_lane() ^ mask];
}
template <class T>
MSL_SHIM T simd_shuffle_up(T x, ushort delta, MSL_HERE) {
  auto all = msl::publish(x, MSL_SHUFFLE, file, line);
  return msl::this_lane() < delta ? x : all[msl::this_lane() - delta];
}
template <class T>
MSL_SHIM T simd_shuffle_down(T x, ushort delta, MSL_HERE) {
  auto all = msl::publish(x, MSL_SHUFFLE, file, line);
  return msl::this_lane() + delta >= 32 ? x : all[msl::this_lane() + delta];
}
template <class T>
MSL_SHIM T simd_shuffle_rotate_up(T x, ushort delta, MSL_HERE) {
  return msl::publish(x, MSL_SHUFFLE, file, line)[msl::this_lane() - delta];
}
template <class T>
MSL_SHIM T simd_shuffle_rotate_down(T x, ushort delta, MSL_HERE) {
  return msl::publish(x, MSL_SHUFFLE, file, line)[msl::this_lane() + delta];
}
template <class T>
MSL_SHIM T simd_broadcast(T x, ushort lane, MSL_HERE) {
  return msl::publish(x, MSL_SHUFFLE, file, line)[lane];
}
template <class T>
MSL_SHIM T simd_broadcast_first(T x, MSL_HERE) {
  return msl::publish(x, MSL_SHUFFLE, file, line)[0];
}
template <class T>
MSL_SHIM T quad_shuffle(T x, ushort lane, MSL_HERE) {
  return msl::publish(x, MSL_SHUFFLE, file, line)[(msl::this_lane() & ~3u) + lane];
}
template <class T>
MSL_SHIM T quad_shuffle_xor(T x, ushort mask, MSL_HERE) {
  return msl::publish(x, MSL_SHUFFLE, file, line)[msl::this_lane() ^ mask];
}
template <class T>
MSL_SHIM T quad_broadcast(T x, ushort lane, MSL_HERE) {
  return msl::publish(x, MSL_SHUFFLE, file, line)[(msl::this_lane() & ~3u) + lane];
}

#define MSL_REDUCTION_OF(NAME, EXPRESSION)                                                    \
  template <class T>                                                                          \
  MSL_SHIM T simd_##NAME(T x, MSL_HERE) {                                                     \
    return msl::reduce(msl::publish(x, MSL_REDUCTION, file, line), 0, msl::lane_count(),      \
                       [](T a, T b) MSL_SHIM -> T { return EXPRESSION; });                    \
  }                                                                                           \
  template <class T>                                                                          \
  MSL_SHIM T quad_##NAME(T x, MSL_HERE) {                                                     \
    return msl::reduce(msl::publish(x, MSL_REDUCTION, file, line), msl::this_lane() & ~3u, 4, \
                       [](T a, T b) MSL_SHIM -> T { return EXPRESSION; });                    \
  }
MSL_REDUCTION_OF(sum, a + b)
MSL_REDUCTION_OF(product, a* b)
MSL_REDUCTION_OF(max, max(a, b))
MSL_REDUCTION_OF(min, min(a, b))
MSL_REDUCTION_OF(and, a& b)
MSL_REDUCTION_OF(or, a | b)
MSL_REDUCTION_OF(xor, a ^ b)
#undef MSL_REDUCTION_OF
inline bool simd_any(bool x, MSL_HERE) { return simd_or(int(x), file, line); }
inline bool simd_all(bool x, MSL_HERE) { return simd_and(int(x), file, line); }
inline bool simd_is_first() { return msl::this_lane() == 0; }

template <class T>
MSL_SHIM T simd_prefix_inclusive_sum(T x, MSL_HERE) {
  auto all = msl::publish(x, MSL_REDUCTION, file, line);
  T sum = 0;
  for (unsigned i = 0; i <= msl::this_lane(); i++) sum += all[i];
  return sum;
}
template <class T>
MSL_SHIM T simd_prefix_exclusive_sum(T x, MSL_HERE) {
  auto all = msl::publish(x, MSL_REDUCTION, file, line);
  T sum = 0;
  for (unsigned i = 0; i < msl::this_lane(); i++) sum += all[i];
  return sum;
}

}  // namespace metal
