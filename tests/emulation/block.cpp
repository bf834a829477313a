#include "emulation/block.h"

#include <cstdlib>
#include <thread>

#include "emulation/poison.h"
#include "emulation/sanitizers.h"
#include "emulation/settings.h"

// Their initial values are not zero, so that they are not in the part of thread-local storage that holds
// `__shared__` variables and is filled before each block.
__thread uint3 threadIdx = {1, 1, 1};
__thread uint3 blockIdx = {1, 1, 1};
__thread dim3 blockDim = {1, 1, 1};
__thread dim3 gridDim = {1, 1, 1};

namespace steadygrad::emulation {
namespace {

struct Running {
  int initialised = 1;
  Block* block = nullptr;
};
__thread Running running;

STEADYGRAD_UNCHECKED uint3 position(uint64_t rank, dim3 size) {
  return {static_cast<unsigned>(rank % size.x), static_cast<unsigned>(rank / size.x % size.y),
          static_cast<unsigned>(rank / size.x / size.y)};
}

}  // namespace

Block::Block() { own_stack_ = thread_fiber(); }

Block::~Block() {
  release_fibers();
  std::free(shared_memory_);
}

// Life cycle.

void Block::release_fibers() {
  for (unsigned i = 0; i < capacity_; ++i) destroy_fiber(threads_[i].fiber);
  stacks_.release();
  delete[] threads_;
  threads_ = nullptr;
  capacity_ = 0;
}

bool Block::prepare(unsigned threads, size_t shared_bytes) {
  if (capacity_ < threads) {
    release_fibers();
    const unsigned capacity = (threads + kWarpLanes - 1) / kWarpLanes * kWarpLanes;
    if (!stacks_.reserve(capacity, settings().stack_bytes)) return false;
    threads_ = new Thread[capacity];
    capacity_ = capacity;
    for (unsigned i = 0; i < capacity; ++i) {
      threads_[i].rank = i;
      threads_[i].fiber = stacks_.create(i, fiber_main);
    }
  }
  if (shared_bytes_ != shared_bytes) {
    std::free(shared_memory_);
    shared_memory_ = nullptr;
    shared_bytes_ = 0;
    constexpr size_t kAlignment = 128;
    // This allocates exactly as many bytes as asked for, so that AddressSanitizer sees an access beyond them.
    if (shared_bytes != 0 && posix_memalign(&shared_memory_, kAlignment, shared_bytes) != 0) return false;
    shared_bytes_ = shared_bytes;
  }
  return true;
}

STEADYGRAD_UNCHECKED void Block::start(uint64_t index) {
  index_ = index;
  size_ = live_ = grid_->thread_count;
  dead_ = false;
  ready_begin_ = ready_count_ = at_barrier_ = at_grid_barrier_ = barrier_phase_ = grid_phase_ = 0;
  random_ = (grid_->seed + index) * 0x9E3779B97F4A7C15 | 1;
  blockIdx = position(index, grid_->blocks);
  blockDim = grid_->threads;
  gridDim = grid_->blocks;
  if (settings().poison) {
    poison_shared_variables();
    poison(shared_memory_, shared_bytes_);
  }
  for (unsigned i = 0; i * kWarpLanes < size_; ++i) {
    const unsigned lanes = size_ - i * kWarpLanes;
    warps_[i].waiting = 0;
    warps_[i].live = lanes >= kWarpLanes ? ~0u : (1u << lanes) - 1;
  }
  for (unsigned i = 0; i < size_; ++i) {
    threads_[i].index = position(i, grid_->threads);
    threads_[i].warp_phase = 0;
    make_ready(&threads_[i]);
  }
}

STEADYGRAD_UNCHECKED void Block::run(Grid& grid, uint64_t index) {
  grid_ = &grid;
  running.block = this;
  if (!prepare(grid.thread_count, grid.shared_bytes)) {
    grid.fail("no memory for the stacks of a block's threads, or too many mappings");
    return;
  }
  start(index);
  release(&start_mark_);
  switch_to(next_ready());
  acquire(&end_mark_);
  if (dead_) abandon();
}

// The threads of a failed block never go on; the next block takes over their stacks and what they wrote.
STEADYGRAD_UNCHECKED void Block::abandon() {
  for (unsigned i = 0; i < size_; ++i) release_as(threads_[i].fiber, own_stack_, &end_mark_);
  acquire(&end_mark_);
  release_fibers();
}

STEADYGRAD_UNCHECKED void Block::fiber_main() {
  Block& block = *running.block;
  enter_fiber(block.current_->fiber, block.own_stack_);
  for (;;) {
    acquire(&block.start_mark_);
    block.grid_->invoke(block.grid_->arguments);
    release(&block.end_mark_);
    block.finish_thread();
  }
}

STEADYGRAD_UNCHECKED void Block::finish_thread() {
  const unsigned rank = current_->rank;
  Warp& warp = warps_[rank / kWarpLanes];
  current_->state = State::exited;
  --live_;
  warp.live &= ~(1u << rank % kWarpLanes);
  leave_warp(warp, rank);
  if (at_grid_barrier_ != 0) fail("thread exits while others of its block wait in grid.sync()");
  if (live_ != 0 && at_barrier_ == live_) release_barrier();
  Thread* next = next_ready();
  if (next == nullptr && live_ != 0) report_deadlock();
  switch_to(next);
}

// Turns.

STEADYGRAD_UNCHECKED void Block::make_ready(Thread* thread) {
  thread->state = State::ready;
  ready_[(ready_begin_ + ready_count_++) % kMaxThreads] = thread;
}

STEADYGRAD_UNCHECKED Thread* Block::next_ready() {
  if (ready_count_ == 0) return nullptr;
  if (grid_->order == Order::reverse) return ready_[(ready_begin_ + --ready_count_) % kMaxThreads];
  if (grid_->order == Order::random) {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    const auto chosen = static_cast<unsigned>((random_ & 0xffffffff) * ready_count_ >> 32);
    Thread*& first = ready_[ready_begin_ % kMaxThreads];
    Thread*& other = ready_[(ready_begin_ + chosen) % kMaxThreads];
    Thread* thread = other;
    other = first;
    first = thread;
  }
  --ready_count_;
  return ready_[ready_begin_++ % kMaxThreads];
}

// Null stands for the OS thread's own stack.
STEADYGRAD_UNCHECKED void Block::switch_to(Thread* thread) {
  Fiber& from = current_ == nullptr ? own_stack_ : current_->fiber;
  Fiber& to = thread == nullptr ? own_stack_ : thread->fiber;
  current_ = thread;
  if (thread != nullptr) threadIdx = thread->index;
  switch_fiber(from, to);
}

// The current thread waits for something; the others go on.
STEADYGRAD_UNCHECKED void Block::wait() {
  Thread* next = next_ready();
  if (next == nullptr) {
    report_deadlock();
  } else if (next != current_) {
    switch_to(next);
  }
}

STEADYGRAD_UNCHECKED void Block::yield() {
  // It may wait for another block, which may have failed.
  if (grid_->cooperative && grid_->has_failed()) {
    dead_ = true;
    switch_to(nullptr);
  }
  if (ready_count_ == 0) std::this_thread::yield();
  if (grid_->order == Order::reverse) {
    // It goes to the end of the ring, or it would get every turn itself.
    current_->state = State::ready;
    ready_[--ready_begin_ % kMaxThreads] = current_;
    ++ready_count_;
  } else {
    make_ready(current_);
  }
  wait();
}

// Barriers.

STEADYGRAD_UNCHECKED void Block::release_barrier() {
  at_barrier_ = 0;
  ++barrier_phase_;
  result_ = votes_;
  for (unsigned i = 0; i < size_; ++i) {
    if (threads_[i].state == State::at_barrier) make_ready(&threads_[i]);
  }
}

STEADYGRAD_UNCHECKED BarrierVotes Block::barrier(bool predicate, Location at) {
  // There are two marks, since some threads may be at the next barrier while others leave this one.
  char* mark = &barrier_marks_[barrier_phase_ % 2];
  release(mark);
  if (at_barrier_ == 0) {
    barrier_location_ = at;
    votes_ = {0, 1, 0};
  } else if (!same_place(at, barrier_location_)) {
    fail("divergent barrier: this thread is at __syncthreads %s:%d while others wait at %s:%d", at.file,
         at.line, barrier_location_.file, barrier_location_.line);
  }
  ++at_barrier_;
  votes_.any |= predicate;
  votes_.all &= predicate;
  votes_.count += predicate;
  current_->state = State::at_barrier;
  current_->at = at;
  if (at_barrier_ == live_) release_barrier();
  wait();
  acquire(mark);
  return result_;
}

STEADYGRAD_UNCHECKED void Block::grid_barrier(Location at) {
  if (!grid_->cooperative) fail("grid.sync() at %s:%d without a cooperative launch", at.file, at.line);
  if (live_ != size_) {
    fail("grid.sync() at %s:%d after %u threads of the block exited", at.file, at.line, size_ - live_);
  }
  char* mark = &grid_->order_marks[grid_phase_ % 2];
  release(mark);
  current_->state = State::at_grid_barrier;
  current_->at = at;
  if (++at_grid_barrier_ == size_) {
    at_grid_barrier_ = 0;
    ++grid_phase_;
    if (!grid_->wait_for_blocks(index_)) {
      dead_ = true;
      switch_to(nullptr);
    }
    for (unsigned i = 0; i < size_; ++i) make_ready(&threads_[i]);
  }
  wait();
  acquire(mark);
}

// What the device functions call.

STEADYGRAD_UNCHECKED BarrierVotes block_barrier(bool predicate, Location at) {
  return running.block->barrier(predicate, at);
}
STEADYGRAD_UNCHECKED void grid_barrier(Location at) { running.block->grid_barrier(at); }
STEADYGRAD_UNCHECKED uint64_t warp_rendezvous(unsigned mask, const WarpRequest& request, Location at) {
  return running.block->warp_rendezvous(mask, request, at);
}
STEADYGRAD_UNCHECKED unsigned live_lanes() { return running.block->live_lanes(); }
STEADYGRAD_UNCHECKED unsigned thread_rank() { return running.block->current().rank; }
STEADYGRAD_UNCHECKED unsigned block_size() { return running.block->size(); }
STEADYGRAD_UNCHECKED uint64_t grid_blocks() { return running.block->grid().block_count; }
STEADYGRAD_UNCHECKED bool grid_is_cooperative() { return running.block->grid().cooperative; }
STEADYGRAD_UNCHECKED void* dynamic_shared_memory() { return running.block->shared_memory(); }
STEADYGRAD_UNCHECKED void yield_thread() { running.block->yield(); }
STEADYGRAD_UNCHECKED void trap(Location at) { running.block->fail("__trap() at %s:%d", at.file, at.line); }

// ThreadSanitizer does not know fences: each is a release and an acquire of one address.
STEADYGRAD_UNCHECKED void memory_fence() {
  static char mark;
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
  release(&mark);
  acquire(&mark);
}

}  // namespace steadygrad::emulation
