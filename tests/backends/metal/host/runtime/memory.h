// The memory of one dispatch: device buffers and the threadgroup arena, with a record of who touched each byte.
//
// Only barriers decide what is a race, not the order in which fibers happened to run. Two threads that access a byte,
// one of them to write, race unless a threadgroup barrier lies between the accesses, or within a simdgroup a simdgroup
// barrier, whose mem_flags cover that memory. Accesses of different threadgroups are never ordered.
#pragma once
#include "abi.h"

namespace memory {

void begin_dispatch(msl_buffer* buffers, int count, uintptr_t image, void** addresses);
void end_dispatch(msl_report*);
void begin_threadgroup();
void order_threadgroup(int spaces);                    // a threadgroup barrier completed
void order_simdgroup(unsigned simdgroup, int spaces);  // a simdgroup barrier completed

void* threadgroup_array(int id, size_t bytes, const char* name, uint32_t site);
void access(uintptr_t address, size_t bytes, bool write, uint32_t site);
void aligned_access(uintptr_t address, size_t bytes, bool write, uint32_t site);

uint32_t site(const char* file, int line);  // a source line given by the shim
uint32_t site(void* return_address);        // a source line to be looked up in the kernel's debug information

}  // namespace memory

// fail() ends the dispatch. report_line() lets the threadgroup go on, and collects races and reads of what nobody
// wrote, since such a read is often the first sign of a race.
[[noreturn]] void fail(const char* kind, const char* format, ...) __attribute__((format(printf, 2, 3)));
void report_line(const char* kind, const char* format, ...) __attribute__((format(printf, 2, 3)));
