#include "memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fibers.h"
#include "thread_sanitizer.h"

namespace memory {
namespace {

constexpr size_t kArenaLimit = 32 << 10;  // bytes of threadgroup memory on every Apple GPU that runs MLX
constexpr uint32_t kLineSite = 1u << 31;

// Who touched a byte, and between which barriers. `group` counts threadgroup barriers over the whole life of the
// runtime, so its number shows whether a record is of an earlier dispatch or threadgroup. `simd` counts simdgroup
// barriers.
struct Record {
  uint32_t group, simd, site;
  uint16_t thread;
};

// The last write, and two of the readers since. Two are enough: if the readers are in several simdgroups, the two
// kept are in different ones. Then a later write races with one of them exactly if it races with any reader since the
// barrier.
struct Cell {
  Record write, reader[2];
};

struct Region {
  const char* name;
  char* begin;
  size_t bytes;
  bool writable, initialised;
  Cell* cells;                 // of writable regions, one for each `grain` bytes
  size_t grain;                // 4, 2 or 1, as the smallest access so far needs
  uint32_t *fetched, *stored;  // for each byte: the interval in which it was last counted
  size_t capacity;             // bytes for which the three tables are allocated
  msl_buffer* counters;        // of a device buffer
};

// A window of address space in equal slots, with one region in the middle of each. An index that leaves its region, in
// either direction, lands in the unmapped rest of the slot. So it is still known which region it belongs to.
struct Window {
  uintptr_t base;
  size_t stride;
  int slots;
  Region* regions;
  const char* kind;
  bool contains(uintptr_t a) const { return a - base < stride * slots; }
  Region& at(uintptr_t a) const { return regions[(a - base) / stride]; }
  char* middle(int slot) const { return (char*)base + slot * stride + stride / 2; }
};

constexpr int kBuffers = 32, kArrays = 64;
constexpr size_t kBufferStride = kThreadSanitizer ? 64 << 20 : 32ull << 30;  // the sanitizer shadows what is reserved
Region buffer_regions[kBuffers], array_regions[kArrays];
Window device_window{0, kBufferStride, kBuffers, buffer_regions, "buffer"};
Window arena_window{0, 1 << 20, kArrays, array_regions, "threadgroup array"};

uintptr_t image_base;
size_t arena_used, arena_most;
uint64_t arena_read, arena_written;

uint32_t interval = 1;  // number of the current interval between threadgroup barriers, for counting traffic
uint32_t dispatch_start, group_start;
uint32_t group_interval[3];  // the same for each msl_space: only barriers that order the space advance it
uint32_t simd_interval[fibers::kMost / 32][3];

constexpr int kReports = 16;
uint64_t reported[kReports];  // pairs of sites
int report_count;

template <class T>
T* zeroed(size_t count) {
  return (T*)mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                  0);
}

void reserve(Window& window) {
  void* p = mmap(nullptr, window.stride * window.slots, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    perror("metal_host: cannot reserve address space");
    abort();
  }
  window.base = (uintptr_t)p;
}

size_t whole_pages(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

void map(Window& window, int slot, size_t bytes) {
  Region& r = window.regions[slot];
  r.begin = window.middle(slot);
  r.bytes = bytes;
  if (bytes) mmap(r.begin, whole_pages(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  if (bytes <= r.capacity) return;
  if (r.capacity) {
    munmap(r.cells, (r.capacity + 4) * sizeof(Cell));
    munmap(r.fetched, r.capacity * 4);
    munmap(r.stored, r.capacity * 4);
  }
  r.cells = zeroed<Cell>(bytes + 4);  // one per byte at worst
  r.fetched = zeroed<uint32_t>(bytes);
  r.stored = zeroed<uint32_t>(bytes);
  r.capacity = bytes;
}

void unmap(Region& r) {
  if (r.bytes)
    mmap(r.begin, whole_pages(r.bytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
}

bool races_with(const Record& past, const Record& now, bool device) {
  if (past.group < (device ? dispatch_start : group_start)) return false;  // none
  if (past.group < group_start) return true;                               // another threadgroup
  if (past.thread == now.thread || past.group != now.group) return false;
  return past.thread / 32 != now.thread / 32 || past.simd == now.simd;
}

// Whether nothing has been reported for these two sites, and there is room for one report more.
bool first_report(uint32_t past_site, uint32_t site) {
  uint64_t key = (uint64_t)past_site << 32 | site;
  for (int i = 0; i < report_count; i++)
    if (reported[i] == key) return false;
  if (report_count == kReports) return false;
  reported[report_count++] = key;
  return true;
}

void report_race(const Region& r, const char* kind, size_t offset, const Record& past, bool past_write,
                 const Record& now, bool write) {
  if (!first_report(past.site, now.site)) return;
  report_line(
      "DataRace", "%s '%s', byte %zu: %s by thread %u at {site:%u} and %s by thread %u at {site:%u}%s", kind, r.name,
      offset, past_write ? "write" : "read", past.thread, past.site, write ? "write" : "read", now.thread, now.site,
      past.group < group_start ? ", in different threadgroups" : ", with no barrier for this memory between them");
}

// Makes the cells fine enough for an access, so that neighbours in one word do not look like a race.
void refine(Region& r, size_t offset, size_t bytes) {
  while ((offset | bytes) % r.grain) {
    for (size_t i = (r.bytes + r.grain - 1) / r.grain; i-- > 0;) r.cells[2 * i] = r.cells[2 * i + 1] = r.cells[i];
    r.grain /= 2;
  }
}

void write_cell(const Region& r, const Window& w, Cell& cell, size_t offset, const Record& now, bool device) {
  if (races_with(cell.write, now, device)) report_race(r, w.kind, offset, cell.write, true, now, true);
  for (const Record& reader : cell.reader)
    if (races_with(reader, now, device)) report_race(r, w.kind, offset, reader, false, now, true);
  cell = {now, {}};
}

void read_cell(const Region& r, const Window& w, Cell& cell, size_t offset, const Record& now, bool device) {
  bool written = r.initialised || cell.write.group >= (device ? dispatch_start : group_start);
  if (!written && first_report(0, now.site))
    report_line("UninitializedRead", "thread %u reads byte %zu of %s '%s', which nothing has written, at {site:%u}",
                now.thread, offset, w.kind, r.name, now.site);
  if (races_with(cell.write, now, device)) report_race(r, w.kind, offset, cell.write, true, now, false);
  Record& first = cell.reader[0];
  if (!races_with(first, now, device)) {
    first = now;  // no earlier reader, or every write that races with it also races with `now`
  } else if (!races_with(cell.reader[1], now, device) || first.thread / 32 == cell.reader[1].thread / 32) {
    cell.reader[1] = now;
  }
}

void count_once(uint32_t* stamps, size_t offset, size_t bytes, uint64_t& counter) {
  for (size_t i = offset; i < offset + bytes; i++) {
    counter += stamps[i] != interval;
    stamps[i] = interval;
  }
}

void touch(const Window& window, uintptr_t address, size_t bytes, bool write, uint32_t site) {
  bool device = &window == &device_window;
  Region& r = window.at(address);
  unsigned thread = fibers::current();
  if (!r.name)
    fail("OutOfBounds", "thread %u %s memory that belongs to no %s, at {site:%u}", thread, write ? "writes" : "reads",
         window.kind, site);
  ptrdiff_t offset = (char*)address - r.begin;
  if (offset < 0 || offset + bytes > r.bytes)
    fail("OutOfBounds", "thread %u %s bytes %td to %td of %s '%s', which has %zu bytes, at {site:%u}", thread,
         write ? "writes" : "reads", offset, offset + (ptrdiff_t)bytes - 1, window.kind, r.name, r.bytes, site);
  if (write && !r.writable)
    fail("ReadOnlyWrite", "thread %u writes byte %td of input '%s', at {site:%u}", thread, offset, r.name, site);
  if (device) {
    (write ? r.counters->written : r.counters->read) += bytes;
    count_once(write ? r.stored : r.fetched, offset, bytes, write ? r.counters->stored : r.counters->fetched);
  } else {
    (write ? arena_written : arena_read) += bytes;
  }
  if (!r.writable) return;
  int space = device ? MSL_SPACE_DEVICE : MSL_SPACE_THREADGROUP;
  Record now{group_interval[space], simd_interval[thread / 32][space], site, (uint16_t)thread};
  refine(r, offset, bytes);
  for (size_t i = offset; i < offset + bytes; i += r.grain)
    (write ? write_cell : read_cell)(r, window, r.cells[i / r.grain], i, now, device);
}

const char* site_files[128];  // strings of kernels, which are never unloaded

// Not strcmp: the sanitizer watches the C library, and would take this table of files for the kernel's data.
bool same_text(const char* a, const char* b) {
  while (*a && *a == *b) a++, b++;
  return *a == *b;
}

}  // namespace

uint32_t site(const char* file, int line) {
  static const char* latest;
  static uint32_t id;
  if (file != latest) {
    latest = file;
    for (id = 0; id < 127 && site_files[id] && !same_text(site_files[id], file);) id++;
    if (!site_files[id]) site_files[id] = file;
  }
  return kLineSite | id << 24 | (uint32_t)line;
}

uint32_t site(void* return_address) { return (uint32_t)((uintptr_t)return_address - 1 - image_base); }

void begin_dispatch(msl_buffer* buffers, int count, uintptr_t image, void** addresses) {
  if (!device_window.base) {
    reserve(device_window);
    reserve(arena_window);
    for (int i = 0; i < kArrays; i++) map(arena_window, i, kArenaLimit);
  }
  image_base = image;
  dispatch_start = ++interval;
  report_count = 0;
  arena_most = arena_read = arena_written = 0;
  for (Region& r : array_regions) r.grain = 4;
  for (int i = 0; i < count; i++) {
    msl_buffer& b = buffers[i];
    Region& r = buffer_regions[i];
    map(device_window, i, b.bytes);
    r.name = b.name, r.writable = b.writable, r.initialised = b.initialised, r.counters = &b, r.grain = 4;
    b.read = b.written = b.fetched = b.stored = b.unwritten = 0;
    if (b.initialised)
      memcpy(r.begin, b.data, b.bytes);
    else
      memset(r.begin, 0xff, b.bytes);
    addresses[i] = r.begin;
  }
  for (int i = count; i < kBuffers; i++) buffer_regions[i].name = nullptr;
}

void end_dispatch(msl_report* report) {
  report->threadgroup_read = arena_read;
  report->threadgroup_written = arena_written;
  report->threadgroup_memory = arena_most;
  for (Region& r : buffer_regions) {
    if (!r.name) continue;
    if (r.writable) {
      memcpy(r.counters->data, r.begin, r.bytes);
      if (!r.initialised)
        for (size_t i = 0; i < r.bytes; i++) r.counters->unwritten += r.cells[i / r.grain].write.group < dispatch_start;
    }
    unmap(r);
    r.name = nullptr;
  }
}

void begin_threadgroup() {
  group_start = ++interval;
  for (uint32_t& i : group_interval) i = interval;
  memset(simd_interval, 0, sizeof simd_interval);
  arena_used = 0;
  for (Region& r : array_regions) r.name = nullptr;
}

void order_threadgroup(int spaces) {
  interval++;
  for (int space = MSL_SPACE_THREADGROUP; space <= MSL_SPACE_DEVICE; space++)
    if (spaces & space) group_interval[space] = interval;
}

void order_simdgroup(unsigned simdgroup, int spaces) {
  for (int space = MSL_SPACE_THREADGROUP; space <= MSL_SPACE_DEVICE; space++)
    if (spaces & space) simd_interval[simdgroup][space]++;
}

void* threadgroup_array(int id, size_t bytes, const char* name, uint32_t site) {
  if (id >= kArrays) fail("Unsupported", "more than %d threadgroup arrays, at {site:%u}", kArrays, site);
  Region& r = array_regions[id];
  if (r.name) return r.begin;
  arena_used = (arena_used + 15) / 16 * 16 + bytes;
  if (arena_used > arena_most) arena_most = arena_used;
  if (arena_used > kArenaLimit)
    fail("ThreadgroupMemory",
         "threadgroup array '%s' brings threadgroup memory to %zu bytes, more than %zu, at {site:%u}", name, arena_used,
         kArenaLimit, site);
  r.bytes = bytes, r.name = name, r.writable = true, r.initialised = false;
  for (size_t i = 0; i < bytes; i++) r.begin[i] = (char)0xff;
  return r.begin;
}

void access(uintptr_t address, size_t bytes, bool write, uint32_t site) {
  if (kThreadSanitizer || fibers::on_own_stack(address)) return;
  if (arena_window.contains(address)) return touch(arena_window, address, bytes, write, site);
  if (device_window.contains(address)) return touch(device_window, address, bytes, write, site);
  if (fibers::on_any_stack(address))
    fail("OutOfBounds", "thread %u %s thread memory that is not its own, at {site:%u}", fibers::current(),
         write ? "writes" : "reads", site);
  if (write) fail("OutOfBounds", "thread %u writes outside every buffer, at {site:%u}", fibers::current(), site);
  if (address < 4096)
    fail("OutOfBounds", "thread %u reads through a null pointer, at {site:%u}", fibers::current(), site);
}

void aligned_access(uintptr_t address, size_t bytes, bool write, uint32_t site) {
  if (address % bytes)
    fail("Misaligned", "thread %u %s %zu bytes at an address that is no multiple of them, at {site:%u}",
         fibers::current(), write ? "writes" : "reads", bytes, site);
  access(address, bytes, write, site);
}

}  // namespace memory

const char* msl_site_file(uint32_t site) { return memory::site_files[site >> 24 & 127]; }

// The hooks that code compiled with `-fsanitize=kernel-address` calls before each load and store. Hooks of a fixed size
// are for types that are aligned to that size.
#define HERE memory::site(__builtin_return_address(0))
#define HOOKS(n)                                                                            \
  void __asan_load##n##_noabort(uintptr_t a) { memory::aligned_access(a, n, false, HERE); } \
  void __asan_store##n##_noabort(uintptr_t a) { memory::aligned_access(a, n, true, HERE); }
extern "C" {
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16) void __asan_loadN_noabort(uintptr_t a, size_t n) {
  memory::access(a, n, false, HERE);
}
void __asan_storeN_noabort(uintptr_t a, size_t n) { memory::access(a, n, true, HERE); }
void* __asan_memset(void* to, int value, size_t n) {
  memory::access((uintptr_t)to, n, true, HERE);
  return memset(to, value, n);
}
void* __asan_memcpy(void* to, const void* from, size_t n) {
  memory::access((uintptr_t)from, n, false, HERE);
  memory::access((uintptr_t)to, n, true, HERE);
  return memcpy(to, from, n);
}
void* __asan_memmove(void* to, const void* from, size_t n) {
  memory::access((uintptr_t)from, n, false, HERE);
  memory::access((uintptr_t)to, n, true, HERE);
  return memmove(to, from, n);
}
void __asan_handle_no_return() {}

// `-fsanitize=array-bounds`: an index outside an array whose size the compiler knows.
void __ubsan_handle_out_of_bounds(void*, uintptr_t index) {
  fail("OutOfBounds", "thread %u uses index %td outside an array, at {site:%u}", fibers::current(), (ptrdiff_t)index,
       HERE);
}

// `-fsanitize=integer-divide-by-zero`, which would end the process.
void __ubsan_handle_divrem_overflow(void*, uintptr_t, uintptr_t) {
  fail("DivisionByZero", "thread %u divides an integer by zero, at {site:%u}", fibers::current(), HERE);
}

void msl_load(const void* p, size_t n, const char* file, int line) {
  memory::access((uintptr_t)p, n, false, memory::site(file, line));
}
void msl_store(const void* p, size_t n, const char* file, int line) {
  memory::access((uintptr_t)p, n, true, memory::site(file, line));
}
void* msl_threadgroup_array(int id, size_t n, const char* name, const char* file, int line) {
  return memory::threadgroup_array(id, n, name, memory::site(file, line));
}
}
