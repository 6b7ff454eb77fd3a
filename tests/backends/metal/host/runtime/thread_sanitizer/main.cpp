// One dispatch under clang's ThreadSanitizer, which needs a program of its own. thread_sanitizer.py writes to its
// standard input: number of buffers, grid, threadgroup and seed; then for each buffer the length of its name, its
// bytes, writable, initialised, its name and its contents. The sanitizer reports on standard error.
#include <stdio.h>
#include <stdlib.h>

#include "../abi.h"

extern "C" void msl_entry(void* const* buffers, const msl_position*);

static void read_exactly(void* to, size_t bytes) {
  if (fread(to, 1, bytes, stdin) != bytes) exit(2);
}

int main() {
  struct {
    uint32_t buffers, grid[3], threadgroup[3], seed;
  } header;
  read_exactly(&header, sizeof header);
  msl_buffer buffers[32] = {};
  for (uint32_t i = 0; i < header.buffers; i++) {
    uint32_t about[4];
    read_exactly(about, sizeof about);
    char* name = (char*)calloc(1, about[0] + 1);
    void* data = malloc(about[1] + 1);
    read_exactly(name, about[0]);
    read_exactly(data, about[1]);
    buffers[i] = {name, data, about[1], (int32_t)about[2], (int32_t)about[3], 0, 0, 0, 0, 0};
  }
  static msl_report report;
  msl_dispatch(msl_entry, buffers, header.buffers, header.grid, header.threadgroup, header.seed, &report);
  if (report.message[0]) fprintf(stderr, "stopped: %s\n", report.message);
  return report.message[0] ? 3 : 0;
}
