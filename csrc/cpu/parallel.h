// Threads are those of torch's own OpenMP team, so torch.set_num_threads applies and no second thread pool
// competes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/tensors.h"

namespace steadygrad::cpu {

// Returns the path of the OpenMP library in use, the one that torch has loaded. It is empty if none was
// found, and then everything runs on one thread.
const std::string& openmp_library();

int max_threads();

// Calls body(context, thread, threads) on every thread of a team of at most `threads`.
void run_team(int threads, void (*body)(void*, int thread, int threads), void* context);

// Cuts tensors into chunks: chunk c belongs to chunks[c].tensor, and tensor t has the chunks [offsets[t],
// offsets[t + 1]).
struct ChunkTable {
  std::vector<Chunk> chunks;
  std::vector<int64_t> offsets;
  std::vector<int64_t> cost;  // work in all chunks before this one

  explicit ChunkTable(const std::vector<TensorOperands>& tensors);
  int64_t first_chunk_at(int64_t cost_before) const;
};

// A sleeping team takes up to 100 us to wake, about as long as one thread needs for this many elements.
constexpr int64_t kWorthATeam = 1 << 17;

// Cuts [0, count) into one contiguous range per thread and calls function(first, last) for each. `elements`
// is the total amount of work.
template <class Function>
void for_each_share(int64_t count, int64_t elements, Function function) {
  struct Context {
    int64_t count;
    Function& function;
  } context{count, function};
  const auto body = [](void* opaque, int thread, int threads) {
    auto& [count, function] = *static_cast<Context*>(opaque);
    const int64_t first = count * thread / threads;
    const int64_t last = count * (thread + 1) / threads;
    if (first < last) function(first, last);
  };
  run_team(elements < kWorthATeam ? 1 : max_threads(), body, &context);
}

// Cuts the table into one contiguous range per thread, equal in work, and calls function(first, last) for
// each.
template <class Function>
void for_each_range(const ChunkTable& table, Function function) {
  struct Context {
    const ChunkTable& table;
    Function& function;
  } context{table, function};
  const auto body = [](void* opaque, int thread, int threads) {
    auto& [table, function] = *static_cast<Context*>(opaque);
    const int64_t total = table.cost.back();
    const int64_t first = table.first_chunk_at(total * thread / threads);
    const int64_t last = table.first_chunk_at(total * (thread + 1) / threads);
    if (first < last) function(first, last);
  };
  run_team(table.cost.back() < kWorthATeam ? 1 : max_threads(), body, &context);
}

}  // namespace steadygrad::cpu
