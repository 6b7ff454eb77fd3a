// One fiber for each GPU thread, all on one OS thread. They are cooperative, so a seed always gives the same schedule.
#pragma once
#include <stdint.h>

namespace fibers {

constexpr unsigned kMost = 1024;  // threads in a threadgroup
constexpr uintptr_t kStackBytes = 256 << 10;

// Runs `entry` on fibers 0 … count - 1 until each has returned or none can go on. Seed 0 runs them in order, others
// shuffle.
void run(unsigned count, void (*entry)(unsigned fiber), uint64_t seed);

unsigned current();
bool finished(unsigned fiber);
void block();               // waits until another fiber wakes this one
void wake(unsigned fiber);  // a fiber that blocks
[[noreturn]] void abandon();  // leaves every fiber where it stands and returns from run()

bool on_own_stack(uintptr_t address);
bool on_any_stack(uintptr_t address);
uint64_t shuffle(uint64_t& state, uint64_t bound);  // the next number below `bound` of the seeded sequence

}  // namespace fibers
