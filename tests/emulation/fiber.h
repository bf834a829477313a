// A fiber: a stack of its own that an OS thread can run on, leave and return to.
#pragma once

#include <cstddef>
#include <cstdint>

namespace steadygrad::emulation {

struct Fiber {
  void* stack_pointer = nullptr;  // while it is not running
  const void* stack = nullptr;    // lowest address
  size_t stack_bytes = 0;
  void* race_context = nullptr;  // ThreadSanitizer's
  void* fake_stack = nullptr;    // AddressSanitizer's
};

// Stacks for many fibers in one mapping, with a page below each that faults when one overflows.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() { release(); }

  // Returns false if the system has no memory for so many.
  bool reserve(unsigned count, size_t bytes);
  void release();

  // Fiber `index` begins with `entry` when it is first switched to.
  Fiber create(unsigned index, void (*entry)()) const;

 private:
  char* memory_ = nullptr;
  size_t bytes_ = 0;
  unsigned count_ = 0;
};

// Removes what `create` made beside the stack. The fiber must not be running.
void destroy_fiber(Fiber& fiber);

// Returns the number of fibers in the process.
uint64_t live_fibers();

// Returns the calling OS thread's own stack as a fiber, to switch away from.
Fiber thread_fiber();

void switch_fiber(Fiber& from, Fiber& to);

// Completes the switch that started the fiber; `entry` calls it first. `left` is the fiber that ran before.
void enter_fiber(Fiber& entered, Fiber& left);

// Orders everything that an abandoned fiber did before an acquire of `address`.
void release_as(const Fiber& fiber, const Fiber& current, void* address);

}  // namespace steadygrad::emulation
