// Describes why a kernel cannot go on.
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "emulation/block.h"
#include "emulation/sanitizers.h"

namespace steadygrad::emulation {

STEADYGRAD_UNCHECKED bool same_place(Location a, Location b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// Does not return to the kernel.
STEADYGRAD_UNCHECKED void Block::fail(const char* format, ...) {
  constexpr size_t kPlaceBytes = 100;
  char reason[sizeof grid_->message - kPlaceBytes];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(reason, sizeof reason - kPlaceBytes, format, arguments);
  va_end(arguments);
  const size_t length = std::strlen(reason);
  std::snprintf(reason + length, sizeof reason - length, " in block (%u,%u,%u), thread (%u,%u,%u)",
                blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  grid_->fail(reason);
  dead_ = true;
  switch_to(nullptr);
}

// Groups the threads by what they wait for.
STEADYGRAD_UNCHECKED void Block::report_deadlock() {
  static constexpr const char* kStates[] = {"running", "in __syncthreads", "in a warp function",
                                            "in grid.sync()", "exited"};
  char groups[700] = "";
  size_t length = 0;
  for (unsigned i = 0; i < size_ && length < 450; ++i) {
    const Thread& thread = threads_[i];
    const bool exited = thread.state == State::exited;
    unsigned before = 0;
    unsigned count = 0;
    for (unsigned j = 0; j < size_; ++j) {
      const bool same =
          threads_[j].state == thread.state && (exited || same_place(threads_[j].at, thread.at));
      if (same) ++(j < i ? before : count);
    }
    if (before != 0) continue;
    int written = std::snprintf(groups + length, sizeof groups - length, " %u threads (first %u) %s", count,
                                i, kStates[static_cast<int>(thread.state)]);
    length += static_cast<size_t>(written);
    written = exited ? std::snprintf(groups + length, sizeof groups - length, ";")
                     : std::snprintf(groups + length, sizeof groups - length, " %s:%d;", thread.at.file,
                                     thread.at.line);
    length += static_cast<size_t>(written);
  }
  fail("deadlock: no thread can continue:%s", groups);
}

}  // namespace steadygrad::emulation
