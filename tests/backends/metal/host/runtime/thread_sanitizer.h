// Tells clang's ThreadSanitizer which fiber runs, and what a barrier orders. In other builds these do nothing.
#pragma once

#ifdef MSL_THREAD_SANITIZER
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned flags);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void __tsan_destroy_fiber(void*) {}
inline void __tsan_switch_to_fiber(void*, unsigned) {}
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif
constexpr unsigned kSwitchOrdersNothing = 1;
