#include "fibers.h"

#include <stdlib.h>
#include <sys/mman.h>

#include "thread_sanitizer.h"

namespace fibers {
namespace {

struct Fiber {
  void* stack_pointer;
  bool done;
  void* sanitizer;
};

Fiber fiber[kMost];
char* stacks;                       // kMost stacks, each above a page that faults
unsigned queue[kMost], head, tail;  // ring of fibers that can run
unsigned running;
void* outside;  // the stack pointer of run()
void* outside_sanitizer;
char run_ends;  // an address for the sanitizer
uint64_t random_state;
void (*entry_point)(unsigned);

constexpr uintptr_t kStride = kStackBytes + 4096;

// Saves the callee-saved registers, stores the stack pointer to *save and continues at `next`.
__attribute__((naked, noinline)) void switch_stack(void** save, void* next) {
#if defined(__x86_64__)
  asm volatile(
      "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15;"
      "mov %rsp, (%rdi); mov %rsi, %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
#elif defined(__aarch64__)
  asm volatile(
      "sub sp, sp, #160;"
      "stp x19, x20, [sp, #0]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]; stp x25, x26, [sp, #48];"
      "stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]; stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112];"
      "stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144];"
      "mov x9, sp; str x9, [x0]; mov sp, x1;"
      "ldp x19, x20, [sp, #0]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, #48];"
      "ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]; ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112];"
      "ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144];"
      "add sp, sp, #160; ret");
#else
#error "fibers.cpp knows x86-64 and AArch64"
#endif
}

char* stack_of(unsigned f) { return stacks + f * kStride + 4096; }

unsigned take_next() {
  if (random_state) {
    unsigned pick = head + shuffle(random_state, tail - head);
    unsigned swap = queue[head % kMost];
    queue[head % kMost] = queue[pick % kMost];
    queue[pick % kMost] = swap;
  }
  return queue[head++ % kMost];
}

void leave_to_outside(void** save) {
  __tsan_switch_to_fiber(outside_sanitizer, kSwitchOrdersNothing);
  switch_stack(save, outside);
}

void leave(void** save) {
  if (head == tail) return leave_to_outside(save);
  running = take_next();
  __tsan_switch_to_fiber(fiber[running].sanitizer, kSwitchOrdersNothing);
  switch_stack(save, fiber[running].stack_pointer);
}

void first_call() {
  entry_point(running);
  fiber[running].done = true;
  __tsan_release(&run_ends);
  leave(&fiber[running].stack_pointer);
  abort();  // a finished fiber is never resumed
}

// A fresh stack whose first switch lands in first_call().
void prepare(unsigned f) {
  void** top = (void**)(stack_of(f) + kStackBytes - 64);
#if defined(__x86_64__)
  *--top = nullptr;  // return address of first_call, which never returns; keeps 16-byte alignment
  *--top = (void*)first_call;
  for (int i = 0; i < 6; i++) *--top = nullptr;
#else
  top -= 20;
  for (int i = 0; i < 20; i++) top[i] = nullptr;
  top[11] = (void*)first_call;  // x30
#endif
  fiber[f] = {top, false, __tsan_create_fiber(0)};
}

}  // namespace

uint64_t shuffle(uint64_t& state, uint64_t bound) {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return (state >> 33) % bound;
}

void run(unsigned count, void (*entry)(unsigned), uint64_t seed) {
  if (!stacks) {
    stacks = (char*)mmap(nullptr, kMost * kStride, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (unsigned f = 0; f < kMost; f++) mprotect(stack_of(f), kStackBytes, PROT_READ | PROT_WRITE);
  }
  entry_point = entry;
  random_state = seed;
  head = tail = 0;
  for (unsigned f = 0; f < count; f++) {
    prepare(f);
    wake(f);
  }
  outside_sanitizer = __tsan_get_current_fiber();
  leave(&outside);
  __tsan_acquire(&run_ends);  // run() ends after every fiber, and so before those of the next run()
  for (unsigned f = 0; f < count; f++) __tsan_destroy_fiber(fiber[f].sanitizer);
}

unsigned current() { return running; }
bool finished(unsigned f) { return fiber[f].done; }
void block() { leave(&fiber[running].stack_pointer); }
void wake(unsigned f) { queue[tail++ % kMost] = f; }

void abandon() {
  void* never_resumed;
  leave_to_outside(&never_resumed);
  abort();
}

bool on_own_stack(uintptr_t a) { return a - (uintptr_t)stack_of(running) < kStackBytes; }
bool on_any_stack(uintptr_t a) { return a - (uintptr_t)stacks < kMost * kStride; }

}  // namespace fibers
