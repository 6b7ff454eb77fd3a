// The C interface between a kernel compiled against shim/ and the host runtime.
//
// The compiler puts a call of a `__asan_load*` or `__asan_store*` hook before every load and store of a kernel that is
// left after optimisation. memory.cpp implements the hooks. The shim calls the functions below.
#pragma once
#include <stddef.h>
#include <stdint.h>

extern "C" {

enum msl_scope { MSL_SIMDGROUP, MSL_THREADGROUP };
enum msl_space { MSL_SPACE_THREADGROUP = 1, MSL_SPACE_DEVICE = 2 };  // bits; what a barrier orders
enum msl_operation { MSL_SHUFFLE, MSL_REDUCTION, MSL_MULTIPLY, MSL_OPERATIONS };

// The position of a GPU thread, from which a kernel's position arguments are taken.
struct msl_position {
  uint32_t in_grid[3], in_group[3], group_in_grid[3];
  uint32_t threads_per_group[3], groups_per_grid[3], threads_per_grid[3];
  uint32_t index, lane, simdgroup, simdgroups_per_group, threads_per_simdgroup;
};

// A buffer argument of a kernel. The counters are results. What is neither copied in nor written holds 0xff.
struct msl_buffer {
  const char* name;
  void* data;  // copied in, unless it is an output without initial values; copied out, if writable
  size_t bytes;
  int32_t writable, initialised;
  uint64_t read, written;    // bytes, every access of every thread
  uint64_t fetched, stored;  // bytes, distinct ones per threadgroup and barrier interval
  uint64_t unwritten;        // bytes of an output that no thread wrote
};

struct msl_report {
  uint64_t threadgroup_read, threadgroup_written, threadgroup_memory;  // bytes
  uint64_t threadgroups, barriers, barriers_per_thread, simdgroup_barriers;
  uint64_t operations[MSL_OPERATIONS];  // simdgroup-wide calls
  char message[4096];                   // empty, or "Kind|text" lines with {site:N} where a source line belongs
};

typedef void (*msl_thread_function)(void* const* buffers, const msl_position*);

// Runs the whole grid; returns nonzero if `report->message` holds an error.
int msl_dispatch(msl_thread_function, msl_buffer*, int buffers, const uint32_t threads_per_grid[3],
                 const uint32_t threads_per_group[3], uint64_t seed, msl_report*);
const char* msl_site_file(uint32_t site);  // the file of a site with bit 31 set; its line is the low 24 bits

// Called by the shim, on a GPU thread.
const msl_position* msl_current(void);
void msl_barrier(int scope, int spaces, const char* file, int line);
// Publishes up to 32 bytes to the simdgroup; returns 32 slots of 32 bytes, 0xff where a lane does not exist.
const char* msl_exchange(const void* mine, size_t bytes, int operation, const char* file, int line);
void* msl_threadgroup_array(int id, size_t bytes, const char* name, const char* file, int line);
void msl_load(const void*, size_t bytes, const char* file, int line);
void msl_store(const void*, size_t bytes, const char* file, int line);
void msl_unsupported(const char* what, const char* file, int line);
}
