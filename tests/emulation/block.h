// A block: its threads as fibers that take turns on one OS thread.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulation/execution.h"
#include "emulation/fiber.h"
#include "emulation/grid.h"
#include "emulation/sanitizers.h"
#include "emulation/vector_types.h"

namespace steadygrad::emulation {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxWarps = kMaxThreads / kWarpLanes;

enum class State : uint8_t { ready, at_barrier, at_warp_function, at_grid_barrier, exited };

struct Thread {
  Fiber fiber;
  uint3 index = {};
  unsigned rank = 0;
  State state = State::ready;
  Location at;  // where it waits
  WarpRequest request{};
  unsigned mask = 0;
  unsigned warp_phase = 0;
  uint64_t result = 0;
};

struct Warp {
  unsigned live = 0;
  unsigned waiting = 0;
  char order_marks[2] = {};
};

bool same_place(Location a, Location b);

// A block object belongs to one OS thread, which uses its fibers again for every block and launch.
class Block {
 public:
  // Called on the OS thread that will run it.
  Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block();

  // Runs block `index` of the grid on the calling thread.
  void run(Grid& grid, uint64_t index);

  // Gives the fibers and their stacks back.
  void release_fibers();

  // For the thread that is running.
  BarrierVotes barrier(bool predicate, Location at);
  void grid_barrier(Location at);
  uint64_t warp_rendezvous(unsigned mask, const WarpRequest& request, Location at);
  void yield();
  __attribute__((format(printf, 2, 3))) void fail(const char* format, ...);

  STEADYGRAD_UNCHECKED const Grid& grid() const { return *grid_; }
  STEADYGRAD_UNCHECKED unsigned size() const { return size_; }
  STEADYGRAD_UNCHECKED const Thread& current() const { return *current_; }
  STEADYGRAD_UNCHECKED unsigned live_lanes() const { return warps_[current_->rank / kWarpLanes].live; }
  STEADYGRAD_UNCHECKED void* shared_memory() const { return shared_memory_; }

 private:
  static void fiber_main();

  bool prepare(unsigned threads, size_t shared_bytes);
  void start(uint64_t index);
  void finish_thread();
  void abandon();
  void make_ready(Thread* thread);
  Thread* next_ready();
  void switch_to(Thread* thread);
  void wait();
  void release_barrier();
  void complete_rendezvous(Warp& warp, const Thread& arrived);
  void leave_warp(Warp& warp, unsigned rank);
  void report_deadlock();

  Grid* grid_ = nullptr;
  uint64_t index_ = 0;  // of the block in its grid
  Thread* threads_ = nullptr;
  Thread* current_ = nullptr;  // null while the OS thread's own stack is in use
  unsigned capacity_ = 0;
  unsigned size_ = 0;
  unsigned live_ = 0;
  bool dead_ = false;
  uint64_t random_ = 1;

  // The ready threads, a ring.
  Thread* ready_[kMaxThreads] = {};
  unsigned ready_begin_ = 0;
  unsigned ready_count_ = 0;

  unsigned at_barrier_ = 0;
  unsigned barrier_phase_ = 0;
  Location barrier_location_;
  BarrierVotes votes_{};   // of those who wait
  BarrierVotes result_{};  // of the last barrier
  unsigned at_grid_barrier_ = 0;
  unsigned grid_phase_ = 0;
  Warp warps_[kMaxWarps];

  // These tell the race detector the order that the start, the barriers and the end of a block give.
  char start_mark_ = 0;
  char end_mark_ = 0;
  char barrier_marks_[2] = {};

  Fiber own_stack_;
  Stacks stacks_;
  void* shared_memory_ = nullptr;
  size_t shared_bytes_ = 0;
};

}  // namespace steadygrad::emulation
