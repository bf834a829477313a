// One launch: its shape, its seed, and what its blocks share while they run.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include "emulation/location.h"
#include "emulation/settings.h"
#include "emulation/vector_types.h"

namespace steadygrad::emulation {

struct Grid {
  void (*invoke)(const void* arguments) = nullptr;
  const void* arguments = nullptr;
  dim3 blocks;
  dim3 threads;
  size_t shared_bytes = 0;
  bool cooperative = false;
  uint64_t block_count = 0;
  unsigned thread_count = 0;  // of each block
  uint64_t launch = 0;
  uint64_t seed = 0;
  Order order = Order::random;

  uint64_t next_block = 0;
  bool failed = false;
  char message[1024] = "";

  // These implement grid.sync(). The marks alternate, because a block may reach the next barrier while
  // another leaves this one.
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t arrived = 0;
  uint64_t live = 0;
  uint64_t phase = 0;
  char order_marks[2] = {};

  bool has_failed() const;

  // Takes the reason of the first failure. Blocks that have not started will not start.
  void fail(const char* reason);

  // Blocks the OS thread of block `block` until every block has called it. Returns false if the grid has
  // failed.
  bool wait_for_blocks(uint64_t block);

  // Every block calls this when it is over.
  void leave(uint64_t block);

  // Returns the next block to run; `block_count` if there is none left.
  uint64_t take_block();
};

}  // namespace steadygrad::emulation
