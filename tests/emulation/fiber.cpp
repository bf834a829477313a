#include "emulation/fiber.h"

#include <atomic>
#include <cstdint>
#include <sys/mman.h>

#include "emulation/sanitizers.h"

// Saves the registers that a call preserves on the old stack, loads those of the new stack, and returns
// there.
extern "C" __attribute__((visibility("hidden"))) void steadygrad_emulation_switch_stack(void** left,
                                                                                        void* entered);

#if defined(__x86_64__)
asm(R"(
.pushsection .text
.p2align 4
.globl steadygrad_emulation_switch_stack
.hidden steadygrad_emulation_switch_stack
.type steadygrad_emulation_switch_stack, @function
steadygrad_emulation_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size steadygrad_emulation_switch_stack, . - steadygrad_emulation_switch_stack
.popsection
)");
#elif defined(__aarch64__)
asm(R"(
.pushsection .text
.p2align 4
.globl steadygrad_emulation_switch_stack
.hidden steadygrad_emulation_switch_stack
.type steadygrad_emulation_switch_stack, %function
steadygrad_emulation_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size steadygrad_emulation_switch_stack, . - steadygrad_emulation_switch_stack
.popsection
)");
#else
#error "the emulator switches stacks on x86-64 and aarch64 only"
#endif

namespace steadygrad::emulation {
namespace {

constexpr size_t kPage = 4096;
#if defined(__x86_64__)
constexpr size_t kSavedWords = 8;  // six registers, the address to return to, and where that one returns
constexpr size_t kReturnAddress = 6;
#else
constexpr size_t kSavedWords = 20;
constexpr size_t kReturnAddress = 11;  // x30
#endif

std::atomic<uint64_t> fibers{0};

}  // namespace

bool Stacks::reserve(unsigned count, size_t bytes) {
  release();
  void* memory = mmap(nullptr, count * bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return false;
  memory_ = static_cast<char*>(memory);
  bytes_ = bytes;
  count_ = count;
  for (unsigned i = 0; i < count; ++i) {
    if (mprotect(memory_ + i * bytes, kPage, PROT_NONE) != 0) {
      release();
      return false;
    }
  }
  return true;
}

void Stacks::release() {
  if (memory_ == nullptr) return;
#if STEADYGRAD_ADDRESS_SANITIZER
  __asan_unpoison_memory_region(memory_, bytes_ * count_);
#endif
  munmap(memory_, bytes_ * count_);
  memory_ = nullptr;
}

STEADYGRAD_UNCHECKED Fiber Stacks::create(unsigned index, void (*entry)()) const {
  Fiber fiber;
  char* stack = memory_ + index * bytes_;
  fiber.stack = stack;
  fiber.stack_bytes = bytes_;
  // Offsets are staggered: with equal ones the frames of all fibers would fall into the same cache sets.
  const uintptr_t top = reinterpret_cast<uintptr_t>(stack + bytes_ - 64 - index * 7 % 32 * 192);
  auto** saved = reinterpret_cast<void**>(top & ~static_cast<uintptr_t>(15)) - kSavedWords;
  for (size_t i = 0; i < kSavedWords; ++i) saved[i] = nullptr;
  saved[kReturnAddress] = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = saved;
#if STEADYGRAD_THREAD_SANITIZER
  fiber.race_context = __tsan_create_fiber(0);
#endif
  fibers.fetch_add(1, std::memory_order_relaxed);
  return fiber;
}

void destroy_fiber([[maybe_unused]] Fiber& fiber) {
#if STEADYGRAD_THREAD_SANITIZER
  __tsan_destroy_fiber(fiber.race_context);
#endif
  fibers.fetch_sub(1, std::memory_order_relaxed);
}

uint64_t live_fibers() { return fibers.load(std::memory_order_relaxed); }

Fiber thread_fiber() {
  Fiber fiber;
#if STEADYGRAD_THREAD_SANITIZER
  fiber.race_context = __tsan_get_current_fiber();
#endif
  return fiber;
}

STEADYGRAD_UNCHECKED void switch_fiber(Fiber& from, Fiber& to) {
#if STEADYGRAD_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#if STEADYGRAD_THREAD_SANITIZER
  constexpr unsigned kNoOrder = 1;  // switching orders no memory accesses; barriers do
  __tsan_switch_to_fiber(to.race_context, kNoOrder);
#endif
  steadygrad_emulation_switch_stack(&from.stack_pointer, to.stack_pointer);
#if STEADYGRAD_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

STEADYGRAD_UNCHECKED void enter_fiber([[maybe_unused]] Fiber& entered, [[maybe_unused]] Fiber& left) {
#if STEADYGRAD_ADDRESS_SANITIZER
  // The OS thread's own stack is known only now, from the first switch away from it.
  const void* stack = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(entered.fake_stack, &stack, &bytes);
  if (left.stack == nullptr) {
    left.stack = stack;
    left.stack_bytes = bytes;
  }
#endif
}

STEADYGRAD_UNCHECKED void release_as([[maybe_unused]] const Fiber& fiber,
                                     [[maybe_unused]] const Fiber& current, [[maybe_unused]] void* address) {
#if STEADYGRAD_THREAD_SANITIZER
  constexpr unsigned kNoOrder = 1;
  __tsan_switch_to_fiber(fiber.race_context, kNoOrder);
  __tsan_release(address);
  __tsan_switch_to_fiber(current.race_context, kNoOrder);
#endif
}

}  // namespace steadygrad::emulation
