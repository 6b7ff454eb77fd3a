// The part of the Metal standard library that the host harness understands, for clang in C++ mode.
//
// One shim, two builds: by default the address-space words vanish, so that a kernel runs on the host; with
// MSL_CHECK_ADDRESS_SPACES they become clang address spaces, so that clang rejects what mixes them (compile only).
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

// A shim function is not instrumented: it reports its own memory accesses, with the line of its caller.
#ifdef MSL_THREAD_SANITIZER  // which finds the caller's line in the call stack
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
