// Threads: torch's own OpenMP team, so that torch.set_num_threads rules and no second thread pool competes
// with it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/tensors.h"

namespace steadygrad::cpu {

// Path of the OpenMP library in use: the one torch has loaded. Empty: none was found and everything runs on
// one thread.
const std::string& openmp_library();

int max_threads();

// Calls body(context, thread, threads) on every thread of a team of at most `threads`.
void run_team(int threads, void (*body)(void*, int thread, int threads), void* context);

// Tensors in chunks: chunk c belongs to chunks[c].tensor, and those of tensor t are [offsets[t], offsets[t +
// 1]).
struct ChunkTable {
  std::vector<Chunk> chunks;
  std::vector<int64_t> offsets;
  std::vector<int64_t> cost;  // work in all chunks before this one

  explicit ChunkTable(const std::vector<TensorOperands>& tensors);
  int64_t first_chunk_at(int64_t cost_before) const;
};

// A team that sleeps takes up to 100 us to wake, about as long as this many elements take on one thread.
constexpr int64_t kWorthATeam = 1 << 17;

// Cuts [0, count) into one contiguous range per thread and calls function(first, last) for each. `elements`
// is how much there is to do.
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
