// The rendezvous of the lanes of a warp.
#include "emulation/block.h"
#include "emulation/sanitizers.h"

namespace steadygrad::emulation {

// Every lane in the mask must arrive at the same call with the same mask.
STEADYGRAD_UNCHECKED uint64_t Block::warp_rendezvous(unsigned mask, const WarpRequest& request, Location at) {
  Thread& thread = *current_;
  const unsigned lane = thread.rank % kWarpLanes;
  Warp& warp = warps_[thread.rank / kWarpLanes];
  if ((mask >> lane & 1) == 0) {
    fail("%s:%d: lane %u is not in its own mask %08x", at.file, at.line, lane, mask);
  }
  if ((mask & ~warp.live) != 0) {
    fail("%s:%d: mask %08x names lanes %08x that have exited or do not exist", at.file, at.line, mask,
         mask & ~warp.live);
  }
  thread.request = request;
  thread.mask = mask;
  thread.at = at;
  warp.waiting |= 1u << lane;
  // Shuffles and votes order no memory accesses; only __syncwarp does.
  const bool orders = request.operation == WarpOperation::synchronize;
  char* mark = &warp.order_marks[thread.warp_phase % 2];
  if (orders) {
    ++thread.warp_phase;
    release(mark);
  }
  if ((warp.waiting & mask) == mask) {
    complete_rendezvous(warp, thread);
    // Otherwise the lane that came last would always go on first.
    if (grid_->order == Order::random && mask != 1u << lane) yield();
  } else {
    thread.state = State::at_warp_function;
    wait();
  }
  if (orders) acquire(mark);
  return thread.result;
}

// Gives every lane its result now, since a lane that goes on may bring its next value before another has
// woken up.
STEADYGRAD_UNCHECKED void Block::complete_rendezvous(Warp& warp, const Thread& arrived) {
  Thread* lanes = &threads_[arrived.rank / kWarpLanes * kWarpLanes];
  const WarpOperation operation = arrived.request.operation;
  const unsigned mask = arrived.mask;
  uint64_t ballot = 0;
  uint64_t folded = 0;
  for (unsigned left = mask; left != 0; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const Thread& other = lanes[lane];
    if (other.mask != mask || other.request.operation != operation || !same_place(other.at, arrived.at)) {
      fail("warp function mismatch: lane %u at %s:%d with mask %08x, lane %d at %s:%d with mask %08x",
           arrived.rank % kWarpLanes, arrived.at.file, arrived.at.line, mask, lane, other.at.file,
           other.at.line, other.mask);
    }
    const uint64_t value = other.request.value;
    ballot |= (value & 1) << lane;
    if (operation == WarpOperation::reduce)
      folded = left == mask ? value : other.request.combine(folded, value);
  }
  for (unsigned left = mask; left != 0; left &= left - 1) {
    Thread& thread = lanes[__builtin_ctz(left)];
    if (operation == WarpOperation::shuffle) {
      // The value of a lane outside the mask is undefined: NaN or -1.
      const int source = thread.request.source;
      thread.result = (mask >> source & 1) != 0 ? lanes[source].request.value : ~uint64_t{0};
    } else if (operation == WarpOperation::match) {
      thread.result = 0;
      for (unsigned others = mask; others != 0; others &= others - 1) {
        const int other = __builtin_ctz(others);
        if (lanes[other].request.value == thread.request.value) thread.result |= uint64_t{1} << other;
      }
    } else {
      thread.result = operation == WarpOperation::reduce ? folded : ballot;
    }
    if (&thread != current_) make_ready(&thread);
  }
  warp.waiting &= ~mask;
}

// Lanes that wait in __syncwarp go on without one that exits; those in other warp functions need its value.
STEADYGRAD_UNCHECKED void Block::leave_warp(Warp& warp, unsigned rank) {
  const unsigned bit = 1u << rank % kWarpLanes;
  Thread* lanes = &threads_[rank / kWarpLanes * kWarpLanes];
  Thread* complete = nullptr;
  for (unsigned left = warp.waiting; left != 0; left &= left - 1) {
    Thread& other = lanes[__builtin_ctz(left)];
    if ((other.mask & bit) == 0) continue;
    if (other.request.operation != WarpOperation::synchronize) {
      fail("thread exits while lane %u waits for it at %s:%d", other.rank % kWarpLanes, other.at.file,
           other.at.line);
    }
    other.mask &= ~bit;
    if ((warp.waiting & other.mask) == other.mask) complete = &other;
  }
  if (complete != nullptr) complete_rendezvous(warp, *complete);
}

}  // namespace steadygrad::emulation
