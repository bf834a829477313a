// What the device functions ask of the block that runs the calling thread; block.cpp and grid.cpp answer.
#pragma once

#include <cstdint>

#include "emulation/location.h"

namespace steadygrad::emulation {

constexpr unsigned kWarpLanes = 32;

struct BarrierVotes {
  int any;
  int all;
  int count;
};

// Waits for every thread of the block that has not exited.
BarrierVotes block_barrier(bool predicate, Location at);

// Waits for every thread of a cooperative grid.
void grid_barrier(Location at);

enum class WarpOperation : uint8_t { synchronize, shuffle, ballot, match, reduce };

// The operation and the operands with which a lane comes to a rendezvous of its warp.
struct WarpRequest {
  WarpOperation operation;
  uint64_t value = 0;
  int source = 0;                                     // shuffle: the lane to read
  uint64_t (*combine)(uint64_t, uint64_t) = nullptr;  // reduce: folds two values
};

// Waits for all lanes in `mask` and returns what the operation gives this lane.
uint64_t warp_rendezvous(unsigned mask, const WarpRequest& request, Location at);

// Returns the lanes of the warp that have not exited.
unsigned live_lanes();
unsigned thread_rank();
unsigned block_size();
uint64_t grid_blocks();
bool grid_is_cooperative();

inline int lane() { return static_cast<int>(thread_rank() % kWarpLanes); }

// Orders memory accesses for the race detector.
void memory_fence();

// Lets another thread of the block run.
void yield_thread();

// Ends the kernel with this reason.
void trap(Location at);

// The `dynamicSmemBytes` of the launch, as `extern __shared__` names them on a GPU.
void* dynamic_shared_memory();

}  // namespace steadygrad::emulation
