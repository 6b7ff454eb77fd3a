// One fiber per GPU thread, on one OS thread: cooperative, so that every schedule can be replayed from its seed.
#pragma once
#include <stdint.h>

namespace fibers {

constexpr unsigned kMost = 1024;  // threads in a threadgroup
constexpr uintptr_t kStackBytes = 256 << 10;

// Runs `entry` on fibers 0 … count-1 until each has returned, or none can go on. seed 0: in order; else shuffled.
void run(unsigned count, void (*entry)(unsigned fiber), uint64_t seed);

unsigned current();
bool finished(unsigned fiber);
void block();               // gives way until someone wakes this fiber
void wake(unsigned fiber);  // another one, which blocks
[[noreturn]] void abandon();  // leaves every fiber where it stands and returns from run()

bool on_own_stack(uintptr_t address);
bool on_any_stack(uintptr_t address);
uint64_t shuffle(uint64_t& state, uint64_t bound);  // the next number below `bound` of the seeded sequence

}  // namespace fibers
