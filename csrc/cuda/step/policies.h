// Clip policies on a block of kLanes threads: all of them call, with the same arguments.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

#include "core/policy.h"
#include "cuda/lanes.h"

namespace steadygrad::cuda {

// Moves [begin, end) by one place; a thread holds several numbers, so that few rounds meet at a barrier.
__device__ __forceinline__ void shift_by_one(double* values, int64_t begin, int64_t end, int direction) {
  constexpr int kHeld = 8;
  constexpr int64_t kRound = kHeld * kLanes;
  for (int64_t done = 0; done < end - begin; done += kRound) {
    // Rounds begin at the side into which the numbers move.
    const int64_t left = end - begin - done;
    const int64_t count = left < kRound ? left : kRound;
    const int64_t first = direction > 0 ? end - done - count : begin + done;
    double held[kHeld];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int64_t i = threadIdx.x + k * kLanes;
      if (i < count) held[k] = values[first + i];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int64_t i = threadIdx.x + k * kLanes;
      if (i < count) values[first + i + direction] = held[k];
    }
  }
}

__device__ __forceinline__ void apply_percentile(const ClipPolicy& policy, double* row, double norm,
                                                 bool learns) {
  if (learns && is_entered(norm)) {
    double* const sorted = row + kNorms + policy.window;
    const Insertion at = insertion_of(row, policy.window, norm);
    __syncthreads();
    shift_by_one(sorted, at.begin, at.end, at.direction);
    __syncthreads();
    if (threadIdx.x == 0) {
      sorted[at.place] = norm;
      enter(row, policy.window, norm);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) limit_to_percentile(policy, row, norm);
}

// Whether the step is skipped for its norm. `lanes` is shared memory for kLanes numbers.
__device__ __forceinline__ bool is_spiked(const Policies& policies, double norm, double* lanes) {
  const double* const row = policies.skip_row;
  if (row == nullptr || !is_entered(norm) || !judges_spikes(policies.skip, row)) return false;
  const double count = static_cast<double>(whole_number(row[kCount], policies.skip.window));
  const auto add = [](double& a, double b) { a += b; };
  const double mean =
      block_combine_in_order(
          static_cast<int64_t>(count), 0.0, lanes, [&](int64_t i) { return row[kNorms + i]; }, add) /
      count;
  const double squares = block_combine_in_order(
      static_cast<int64_t>(count), 0.0, lanes,
      [&](int64_t i) { return (row[kNorms + i] - mean) * (row[kNorms + i] - mean); }, add);
  return is_spike(policies.skip, norm, mean, squares, count);
}

// Returns is_spiked(), and enters the norm either way: a lasting rise must not be skipped for ever.
__device__ __forceinline__ bool enter_and_judge(const Policies& policies, double norm, double* lanes) {
  const bool spike = is_spiked(policies, norm, lanes);
  if (policies.skip_row == nullptr || !is_entered(norm)) return false;
  __syncthreads();
  if (threadIdx.x == 0) enter(policies.skip_row, policies.skip.window, norm);
  return spike;
}

}  // namespace steadygrad::cuda
