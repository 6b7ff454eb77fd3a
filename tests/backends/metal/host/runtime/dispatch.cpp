// Runs a grid, one threadgroup after the other. Its fibers wait for each other at barriers and simdgroup operations.
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "fibers.h"
#include "memory.h"
#include "thread_sanitizer.h"

namespace {

constexpr unsigned kSimd = 32, kSlot = 32;

// Threads that have arrived at a barrier or simdgroup operation and wait for the rest.
struct Meeting {
  unsigned members, arrived, completed;
  uint32_t site;
  unsigned waiting[fibers::kMost];
  char order[2];  // addresses for the sanitizer
};

Meeting group_meeting, simd_meeting[fibers::kMost / kSimd];
uint32_t waits_at[fibers::kMost];
unsigned char turn[fibers::kMost];  // which of the two exchange areas a thread used last
char exchange[fibers::kMost / kSimd][2][kSimd * kSlot];
msl_position position[fibers::kMost];
msl_thread_function kernel;
void* argument[32];
msl_report* report;

// Waits until all members have come to `site`. The last one calls `then` before any of them goes on.
template <class Then>
void meet(Meeting& m, uint32_t site, const char* what, Then then) {
  unsigned me = fibers::current();
  if (!m.arrived) m.site = site;
  if (m.site != site)
    fail("DivergentBarrier", "thread %u is at the %s at {site:%u} while thread %u waits at {site:%u}", me, what, site,
         m.waiting[0], m.site);
  waits_at[me] = site;
  m.waiting[m.arrived++] = me;
  if (m.arrived < m.members) return fibers::block();
  then();
  for (unsigned i = 0; i + 1 < m.arrived; i++) fibers::wake(m.waiting[i]);
  m.arrived = 0;
  m.completed++;
}

void run_thread(unsigned thread) { kernel(argument, &position[thread]); }

void place_threads(const uint32_t group[3], const uint32_t size[3], const uint32_t full[3], const uint32_t groups[3],
                   const uint32_t grid[3], unsigned count) {
  for (unsigned t = 0; t < count; t++) {
    msl_position& p = position[t];
    uint32_t in_group[3] = {t % size[0], t / size[0] % size[1], t / (size[0] * size[1])};
    for (int i = 0; i < 3; i++) {
      p.in_group[i] = in_group[i];
      p.group_in_grid[i] = group[i];
      p.in_grid[i] = group[i] * full[i] + in_group[i];
      p.threads_per_group[i] = size[i];
      p.groups_per_grid[i] = groups[i];
      p.threads_per_grid[i] = grid[i];
    }
    p.index = t, p.lane = t % kSimd, p.simdgroup = t / kSimd, p.simdgroups_per_group = (count + kSimd - 1) / kSimd;
    p.threads_per_simdgroup = kSimd;
  }
}

// To be called after run(). A thread that has not returned waits for others that never come.
void require_all_finished(unsigned count) {
  unsigned stuck = 0, first = 0;
  for (unsigned t = count; t-- > 0;)
    if (!fibers::finished(t)) stuck++, first = t;
  if (stuck && !report->message[0])
    report_line("DivergentBarrier",
                "%u of %u threads wait for ever, thread %u at {site:%u}: the others never come there", stuck, count,
                first, waits_at[first]);
}

}  // namespace

void report_line(const char* kind, const char* format, ...) {
  size_t used = strlen(report->message), room = sizeof report->message - used;
  int n = snprintf(report->message + used, room, "%s%s|", used ? "\n" : "", kind);
  if (n < 0 || (size_t)n >= room) {
    report->message[used] = 0;
    return;
  }
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(report->message + used + n, room - n, format, arguments);
  va_end(arguments);
}

void fail(const char* kind, const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  report_line(kind, "%s", text);
  fibers::abandon();
}

extern "C" {

const msl_position* msl_current() { return &position[fibers::current()]; }

void msl_unsupported(const char* what, const char* file, int line) {
  fail("Unsupported", "%s, at {site:%u}", what, memory::site(file, line));
}

// The sanitizer gets two addresses in turn. With a single one, a thread that leaves this barrier late would acquire
// what faster threads have released at the next barrier, and races between the two would look ordered.
void msl_barrier(int scope, int spaces, const char* file, int line) {
  unsigned simdgroup = fibers::current() / kSimd;
  uint32_t site = memory::site(file, line);
  Meeting& m = scope == MSL_THREADGROUP ? group_meeting : simd_meeting[simdgroup];
  char* order = &m.order[m.completed % 2];
  if (spaces) __tsan_release(order);
  if (scope == MSL_THREADGROUP) {
    meet(m, site, "threadgroup_barrier", [=] {
      memory::order_threadgroup(spaces);
      report->barriers++;
    });
  } else {
    meet(m, site, "simdgroup_barrier", [=] {
      memory::order_simdgroup(simdgroup, spaces);
      report->simdgroup_barriers++;
    });
  }
  if (spaces) __tsan_acquire(order);
}

// Two areas in turn suffice: all threads have read the first exchange before one can reach the third and overwrite it.
const char* msl_exchange(const void* mine, size_t bytes, int operation, const char* file, int line) {
  unsigned me = fibers::current(), simdgroup = me / kSimd;
  Meeting& m = simd_meeting[simdgroup];
  uint32_t site = memory::site(file, line);
  if (operation == MSL_MULTIPLY && m.members != kSimd)
    fail("DivergentBarrier", "a simdgroup_matrix operation in a simdgroup of %u threads, at {site:%u}", m.members,
         site);
  char* area = exchange[simdgroup][turn[me] ^= 1];
  for (size_t i = 0; i < bytes; i++) area[me % kSimd * kSlot + i] = ((const char*)mine)[i];
  meet(m, site, "simdgroup operation", [=] { report->operations[operation]++; });
  return area;
}

int msl_dispatch(msl_thread_function function, msl_buffer* buffers, int count, const uint32_t grid[3],
                 const uint32_t full[3], uint64_t seed, msl_report* into) {
  kernel = function;
  report = into;
  memset(report, 0, sizeof *report);
  Dl_info image;
  dladdr((void*)function, &image);
  memory::begin_dispatch(buffers, count, (uintptr_t)image.dli_fbase, argument);

  uint32_t groups[3];
  for (int i = 0; i < 3; i++) groups[i] = (grid[i] + full[i] - 1) / full[i];
  uint64_t total = (uint64_t)groups[0] * groups[1] * groups[2], random = seed;
  uint64_t stride = 1, start = 0;  // the order of threadgroups: start, start + stride, … modulo total
  if (seed && total > 1) {
    start = fibers::shuffle(random, total);
    auto divides = [&](uint64_t a, uint64_t b) {
      while (b) {
        uint64_t r = a % b;
        a = b, b = r;
      }
      return a != 1;
    };
    do stride = 1 + fibers::shuffle(random, total);
    while (divides(stride, total));
  }
  for (uint64_t n = 0; n < total && !report->message[0]; n++) {
    uint64_t g = (start + n * stride) % total;
    uint32_t group[3] = {(uint32_t)(g % groups[0]), (uint32_t)(g / groups[0] % groups[1]),
                         (uint32_t)(g / groups[0] / groups[1])};
    uint32_t size[3];
    for (int i = 0; i < 3; i++) size[i] = group[i] + 1 < groups[i] ? full[i] : grid[i] - group[i] * full[i];
    unsigned threads = size[0] * size[1] * size[2];

    memory::begin_threadgroup();
    // A dispatch that failed left its threads anywhere, some of a simdgroup before an exchange and some behind it.
    memset(turn, 0, sizeof turn);
    place_threads(group, size, full, groups, grid, threads);
    group_meeting.members = threads, group_meeting.arrived = 0;
    for (unsigned s = 0; s * kSimd < threads; s++) {
      simd_meeting[s].members = threads - s * kSimd < kSimd ? threads - s * kSimd : kSimd;
      simd_meeting[s].arrived = 0;
      memset(exchange[s], 0xff, sizeof exchange[s]);
    }
    uint64_t barriers_before = report->barriers;
    fibers::run(threads, run_thread, seed ? random + n + 1 : 0);
    require_all_finished(threads);
    uint64_t barriers = report->barriers - barriers_before;
    if (barriers > report->barriers_per_thread) report->barriers_per_thread = barriers;
    report->threadgroups++;
  }
  memory::end_dispatch(report);
  return report->message[0] != 0;
}
}
