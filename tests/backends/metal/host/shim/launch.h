// What the lowered source needs besides the Metal library: threadgroup arrays, and the arguments of a kernel.
#pragma once

namespace msl {

// `threadgroup float x[8];` in a kernel becomes `threadgroup float (&x)[8] = msl::threadgroup_array<float[8]>(…);`
template <class Array>
threadgroup Array& threadgroup_array(int id, const char* name, const char* file = __builtin_FILE(),
                                     int line = __builtin_LINE()) {
  return *(threadgroup Array*)msl_threadgroup_array(id, sizeof(Array), name, file, line);
}

template <class Function, int I>
struct parameter;
template <class... P, int I>
struct parameter<void (*)(P...), I> {
  using type = __type_pack_element<I, P...>;
};

template <class P>
struct argument;
template <class T>
struct argument<T*> {
  static T* from(void* p) { return (T*)p; }
};
template <class T>
struct argument<T&> {
  static T& from(void* p) { return *(T*)p; }
};

// The I-th parameter of Function, made of a buffer's address. A reference refers to the buffer's first element.
template <class Function, int I>
typename parameter<Function, I>::type buffer(void* p) {
  return argument<typename parameter<Function, I>::type>::from(p);
}

// The same for a position. It has three numbers, of which the parameter takes one, two or three, as its type says.
template <class Function, int I>
typename parameter<Function, I>::type position(const uint32_t* p) {
  using P = typename parameter<Function, I>::type;
  P result{};
  if constexpr (scalar_of<P>::width == 1)
    result = p[0];
  else
    for (int i = 0; i < scalar_of<P>::width; i++) result[i] = p[i];
  return result;
}

}  // namespace msl
