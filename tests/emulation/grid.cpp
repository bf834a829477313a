#include "emulation/grid.h"

#include <cstdio>
#include <cstring>

#include "emulation/sanitizers.h"

namespace steadygrad::emulation {

STEADYGRAD_UNCHECKED bool Grid::has_failed() const { return __atomic_load_n(&failed, __ATOMIC_RELAXED); }

STEADYGRAD_UNCHECKED void Grid::fail(const char* reason) {
  if (__atomic_exchange_n(&failed, true, __ATOMIC_RELAXED)) return;
  std::snprintf(message, sizeof message, "%s [launch %llu, STEADYGRAD_EMULATION_SEED=%llu]", reason,
                static_cast<unsigned long long>(launch), static_cast<unsigned long long>(settings().seed));
}

STEADYGRAD_UNCHECKED bool Grid::wait_for_blocks(uint64_t block) {
  std::unique_lock<std::mutex> lock(mutex);
  if (live != block_count) {
    char reason[128];
    std::snprintf(reason, sizeof reason, "block %llu reaches grid.sync() after another block exited",
                  static_cast<unsigned long long>(block));
    fail(reason);
    changed.notify_all();
    return false;
  }
  if (++arrived == live) {
    arrived = 0;
    ++phase;
    changed.notify_all();
    return !has_failed();
  }
  const uint64_t before = phase;
  while (phase == before && !has_failed()) changed.wait(lock);
  return !has_failed();
}

STEADYGRAD_UNCHECKED void Grid::leave(uint64_t block) {
  const std::lock_guard<std::mutex> lock(mutex);
  --live;
  if (arrived != 0 && !has_failed()) {
    char reason[128];
    std::snprintf(reason, sizeof reason, "block %llu exits while other blocks wait in grid.sync()",
                  static_cast<unsigned long long>(block));
    fail(reason);
  }
  if (has_failed()) changed.notify_all();
}

STEADYGRAD_UNCHECKED uint64_t Grid::take_block() {
  if (has_failed()) return block_count;
  const uint64_t k = __atomic_fetch_add(&next_block, uint64_t{1}, __ATOMIC_RELAXED);
  if (k >= block_count || order == Order::forward) return k < block_count ? k : block_count;
  if (order == Order::reverse) return block_count - 1 - k;
  // This prime is larger than any grid, so that every block comes once.
  constexpr uint64_t kStep = 2654435761;
  return (k * kStep + seed % block_count) % block_count;
}

}  // namespace steadygrad::emulation
