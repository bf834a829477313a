// What ThreadSanitizer and AddressSanitizer have to be told about fibers; nothing in other builds.
#pragma once

#include <cstddef>

#if defined(__has_feature)
#define STEADYGRAD_HAS_FEATURE(name) __has_feature(name)
#else
#define STEADYGRAD_HAS_FEATURE(name) 0
#endif
#if defined(__SANITIZE_THREAD__) || STEADYGRAD_HAS_FEATURE(thread_sanitizer)
#define STEADYGRAD_THREAD_SANITIZER 1
#else
#define STEADYGRAD_THREAD_SANITIZER 0
#endif
#if defined(__SANITIZE_ADDRESS__) || STEADYGRAD_HAS_FEATURE(address_sanitizer)
#define STEADYGRAD_ADDRESS_SANITIZER 1
#else
#define STEADYGRAD_ADDRESS_SANITIZER 0
#endif
#undef STEADYGRAD_HAS_FEATURE

// Marks every function that touches the state of a block. The block's fibers take turns on one OS thread, but
// the race detector takes each fiber for a thread, and would report a race. Such a function must not call
// templates of the standard library, since their instantiations would be checked.
#if STEADYGRAD_THREAD_SANITIZER
#define STEADYGRAD_UNCHECKED __attribute__((noinline, no_sanitize("thread")))
#else
#define STEADYGRAD_UNCHECKED
#endif

// Declared here, because not every compiler comes with the headers that do.
#if STEADYGRAD_THREAD_SANITIZER
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif
#if STEADYGRAD_ADDRESS_SANITIZER
extern "C" {
void __asan_unpoison_memory_region(const volatile void* memory, size_t bytes);
void __sanitizer_start_switch_fiber(void** fake_stack, const void* stack, size_t bytes);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** left_stack, size_t* left_bytes);
}
#endif

namespace steadygrad::emulation {

// Orders everything that this thread did so far before whatever follows an acquire of the same address.
STEADYGRAD_UNCHECKED inline void release([[maybe_unused]] void* address) {
#if STEADYGRAD_THREAD_SANITIZER
  __tsan_release(address);
#endif
}

STEADYGRAD_UNCHECKED inline void acquire([[maybe_unused]] void* address) {
#if STEADYGRAD_THREAD_SANITIZER
  __tsan_acquire(address);
#endif
}

}  // namespace steadygrad::emulation
