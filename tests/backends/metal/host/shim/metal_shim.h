// The part of the Metal standard library that the host harness knows, for clang in C++ mode.
//
// By default the address-space words mean nothing, so that a kernel runs on the host. With MSL_CHECK_ADDRESS_SPACES
// they are clang's address spaces, so that clang rejects a kernel that mixes them. That build is only compiled, never
// run.
#pragma once
#pragma GCC system_header
#include "../runtime/abi.h"

#ifdef MSL_CHECK_ADDRESS_SPACES
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define constant
#define threadgroup
#endif
#define thread
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_CONST constant constexpr

// The compiler puts no hooks into a shim function. It reports its memory accesses itself, with the line of its caller.
#ifdef MSL_THREAD_SANITIZER  // the sanitizer finds the caller's line in the call stack
#define MSL_SHIM __attribute__((noinline))
#else
#define MSL_SHIM __attribute__((no_sanitize("kernel-address")))
#endif
#define MSL_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

#include "types.h"
#include "math.h"
#include "traits.h"
#include "simdgroup.h"
#include "simdgroup_matrix.h"
#include "launch.h"

using namespace metal;
