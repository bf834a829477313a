#include "emulation/workers.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <unistd.h>
#include <vector>

#include "emulation/block.h"
#include "emulation/sanitizers.h"

namespace steadygrad::emulation {
namespace {

// The number of threads and fibers that ThreadSanitizer may see at a time; it fails a little above 8000.
constexpr uint64_t kMaxFollowed = 7000;
// If races are looked for, grids of at most so many blocks get one worker per block: two blocks that one
// worker runs, one after the other, look ordered, which hides their races.
constexpr uint64_t kMaxApart = 4400;

constexpr uint64_t kAnyBlock = ~uint64_t{0};

struct InBlock {
  int initialised = 1;  // not where shared variables are
  bool value = false;
};
__thread InBlock in_block;

// Every worker communicates through its own variables: common ones would order what one block did before the
// start of another, and so hide races.
class Worker {
 public:
  Worker() {
    std::thread([this] { loop(); }).detach();
  }

  void start(Grid& grid, uint64_t block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    grid_ = &grid;
    block_ = block;
    changed_.notify_one();
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return grid_ == nullptr; });
  }

  // This may be called only while no grid runs.
  void release_fibers() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (state_ != nullptr) state_->release_fibers();
  }

 private:
  void loop() {
    in_block.value = true;
    std::fesetenv(FE_DFL_ENV);  // a device knows nothing of the modes of whoever launches first
    Block state;
    std::unique_lock<std::mutex> lock(mutex_);
    state_ = &state;
    for (;;) {
      changed_.wait(lock, [this] { return grid_ != nullptr; });
      lock.unlock();
      work(state, *grid_, block_);
      lock.lock();
      grid_ = nullptr;
      changed_.notify_one();
    }
  }

  static void work(Block& state, Grid& grid, uint64_t block) {
    if (block != kAnyBlock) {
      state.run(grid, block);
      grid.leave(block);
      return;
    }
    for (uint64_t next = grid.take_block(); next < grid.block_count; next = grid.take_block()) {
      state.run(grid, next);
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  Grid* grid_ = nullptr;
  uint64_t block_ = kAnyBlock;
  Block* state_ = nullptr;
};

class Workers {
 public:
  bool run(Grid& grid) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t each = (grid.thread_count + kWarpLanes - 1) / kWarpLanes * kWarpLanes + 1;
    const bool apart =
        grid.cooperative || (STEADYGRAD_THREAD_SANITIZER != 0 && grid.block_count <= kMaxApart / each);
    uint64_t count = apart ? grid.block_count : std::min<uint64_t>(settings().threads, grid.block_count);
    if (STEADYGRAD_THREAD_SANITIZER != 0) {
      if (!apart) count = std::min(count, kMaxApart / each);
      if (count * each > kMaxFollowed) {
        grid.fail("more threads at a time than ThreadSanitizer can follow");
        return true;
      }
      if (live_fibers() + count * each > kMaxFollowed) release_fibers();
    }
    try {
      while (workers_.size() < count) workers_.push_back(std::make_unique<Worker>());
    } catch (const std::system_error&) {
      return false;
    }
    for (uint64_t i = 0; i < count; ++i) workers_[i]->start(grid, apart ? i : kAnyBlock);
    for (uint64_t i = 0; i < count; ++i) workers_[i]->wait();
    return true;
  }

 private:
  void release_fibers() {
    for (const auto& worker : workers_) worker->release_fibers();
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

// A child of fork() has none of its parent's threads, and starts its own; it does not touch the inherited
// ones.
struct Process {
  pid_t id;
  Workers workers;
};

Workers& workers() {
  static std::atomic<Process*> current{nullptr};
  const pid_t id = getpid();
  Process* process = current.load(std::memory_order_acquire);
  while (process == nullptr || process->id != id) {
    auto* fresh = new Process{id, {}};
    if (current.compare_exchange_strong(process, fresh, std::memory_order_acq_rel)) return fresh->workers;
    delete fresh;
  }
  return process->workers;
}

}  // namespace

bool run_grid(Grid& grid) { return !in_block.value && workers().run(grid); }

}  // namespace steadygrad::emulation
