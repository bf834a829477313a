// Mistakes that kernels make, each beside the same kernel without it: `defects NAME right|wrong ROUNDS`.
// Prints a line per round: "right", "wrong", or why the launch failed. Without arguments: the names.
#include <cooperative_groups.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_runtime.h>

#include "emulation/execution.h"

namespace {

namespace groups = cooperative_groups;

constexpr int kElements = 256;
constexpr int kBlocks = 8;

struct Scratch {
  float partial[kBlocks];
  unsigned counter;
};

template <bool kRight>
__global__ void missing_barrier(const float* x, float* y, Scratch*) {
  __shared__ float values[kElements];
  const unsigned thread = threadIdx.x;
  values[thread] = x[thread];
  if (kRight) __syncthreads();
  y[thread] = values[kElements - 1 - thread];  // wrong: may not have been written yet
}

template <bool kRight>
__global__ void overwritten_too_early(const float* x, float* y, Scratch*) {
  __shared__ float values[8];
  float sum = 0;
  for (int round = 0; round < 4; ++round) {
    if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = x[threadIdx.x / 32] + static_cast<float>(round);
    __syncthreads();
    for (const float value : values) sum += value;
    if (kRight) __syncthreads();  // wrong: the next round overwrites what others still read
  }
  y[threadIdx.x] = sum;
}

template <bool kRight>
__global__ void missing_syncwarp(const float* x, float* y, Scratch*) {
  __shared__ float values[32];
  values[threadIdx.x] = x[threadIdx.x];
  if (kRight) __syncwarp();
  y[threadIdx.x] = values[threadIdx.x ^ 1];  // wrong: the lanes of a warp need not run in step
}

template <bool kRight>
__global__ void divergent_barrier(const float* x, float* y, Scratch*) {
  if (kRight) {
    __syncthreads();
  } else if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();  // wrong: another barrier than the first warp's
  }
  y[threadIdx.x] = x[threadIdx.x];
}

template <bool kRight>
__global__ void barrier_in_branch(const float* x, float* y, Scratch*) {
  float value = x[threadIdx.x];
  if (kRight || threadIdx.x < 100) __syncthreads();  // wrong: the fourth warp is torn apart
  value += __shfl_xor_sync(~0u, value, 1);
  y[threadIdx.x] = value;
}

template <bool kRight>
__global__ void shuffle_in_branch(const float* x, float* y, Scratch*) {
  float value = x[threadIdx.x];
  const unsigned lanes = kRight ? 32 : 8;
  if (threadIdx.x < lanes) value += __shfl_xor_sync(~0u, value, 1);  // wrong: names lanes that do not come
  __syncthreads();
  y[threadIdx.x] = value;
}

template <bool kRight>
__global__ void shuffle_after_exit(const float* x, float* y, Scratch*) {
  if (threadIdx.x >= 200) return;
  const unsigned mask = kRight && threadIdx.x >= 192 ? 0xffu : ~0u;  // wrong: names lanes that have left
  y[threadIdx.x] = __shfl_xor_sync(mask, x[threadIdx.x], 1);
}

template <bool kRight>
__global__ void outside_shared_memory(const float* x, float* y, Scratch*) {
  __shared__ float values[kElements];
  const unsigned place = threadIdx.x + (kRight ? 0 : 1);  // wrong: the last thread is one off the end
  values[place] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = values[place];
}

template <bool kRight>
__global__ void outside_dynamic_shared_memory(const float* x, float* y, Scratch*) {
  auto* values = static_cast<float*>(steadygrad::emulation::dynamic_shared_memory());
  const unsigned place = threadIdx.x + (kRight ? 0 : 1);  // wrong: the last thread is one off the end
  values[place] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = values[place];
}

template <bool kRight>
__global__ void outside_global_memory(const float* x, float* y, Scratch*) {
  float value = x[threadIdx.x];
  if (!kRight) value = max(value, x[threadIdx.x + 1] < 0 ? 1.0f : 0.0f);  // wrong: reads one off the end
  y[threadIdx.x] = value;
}

template <bool kRight>
__global__ void misaligned_vector(const float* x, float* y, Scratch*) {
  const float* first = x + 4 * threadIdx.x + (kRight ? 0 : 1);  // wrong: 16 bytes at an address of 4
  if (threadIdx.x < 63) y[threadIdx.x] = reinterpret_cast<const float4*>(first)->x;
}

template <bool kRight>
__global__ void uninitialized_shared_memory(const float* x, float* y, Scratch*) {
  __shared__ float sum;
  if (kRight && threadIdx.x == 0) sum = 0;  // wrong: starts from what was there
  __syncthreads();
  atomicAdd(&sum, x[threadIdx.x]);
  __syncthreads();
  y[threadIdx.x] = sum;
}

template <bool kRight>
__global__ void sum_without_atomic(const float* x, float* y, Scratch*) {
  if (kRight) {
    atomicAdd(y, x[threadIdx.x]);
  } else {
    *y += x[threadIdx.x];  // wrong: threads lose each other's updates
  }
}

template <bool kRight>
__global__ void missing_grid_sync(const float* x, float* y, Scratch* scratch) {
  if (threadIdx.x == 0) scratch->partial[blockIdx.x] = x[blockIdx.x];
  if (kRight) groups::this_grid().sync();
  if (threadIdx.x == 0) y[blockIdx.x] = scratch->partial[(blockIdx.x + 1) % kBlocks];  // wrong: not yet there
}

template <bool kRight>
__global__ void grid_sync_by_some(const float* x, float* y, Scratch*) {
  if (kRight || blockIdx.x != 3) groups::this_grid().sync();  // wrong: one block does not come
  if (threadIdx.x == 0) y[blockIdx.x] = x[blockIdx.x];
}

template <bool kRight>
__global__ void missing_fence(const float* x, float* y, Scratch* scratch) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    scratch->partial[blockIdx.x] = x[blockIdx.x];
    if (kRight) __threadfence();  // wrong: the counter may be seen before the partial sum
    last = atomicInc(&scratch->counter, gridDim.x - 1) == gridDim.x - 1;
    if (kRight) __threadfence();
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  float sum = 0;
  for (const float partial : scratch->partial) sum += partial;
  *y = sum;
}

using Kernel = void (*)(const float*, float*, Scratch*);

struct Case {
  const char* name;
  Kernel right;
  Kernel wrong;
  unsigned blocks;
  unsigned threads;
  unsigned results;
  float (*expected)(const float* x, unsigned i);
  size_t shared_bytes = 0;
  bool cooperative = false;
};

float same(const float* x, unsigned i) { return x[i]; }
float reversed(const float* x, unsigned i) { return x[kElements - 1 - i]; }
float neighbour(const float* x, unsigned i) { return x[i ^ 1]; }
float pair(const float* x, unsigned i) { return x[i] + x[i ^ 1]; }
float pair_in_first_warp(const float* x, unsigned i) { return i < 32 ? pair(x, i) : x[i]; }
float fourth(const float* x, unsigned i) { return x[4 * i]; }
float next_block(const float* x, unsigned i) { return x[(i + 1) % kBlocks]; }
float sum_of(const float* x, unsigned count) {
  float sum = 0;
  for (unsigned i = 0; i < count; ++i) sum += x[i];
  return sum;
}
float sum_of_all(const float* x, unsigned) { return sum_of(x, kElements); }
float sum_of_blocks(const float* x, unsigned) { return sum_of(x, kBlocks); }
float sum_of_rounds(const float* x, unsigned) { return 4 * sum_of(x, 8) + 8 * (0 + 1 + 2 + 3); }

const Case kCases[] = {
    {"missing_barrier", missing_barrier<true>, missing_barrier<false>, 1, 256, 256, reversed},
    {"overwritten_too_early", overwritten_too_early<true>, overwritten_too_early<false>, 1, 256, 256,
     sum_of_rounds},
    {"missing_syncwarp", missing_syncwarp<true>, missing_syncwarp<false>, 1, 32, 32, neighbour},
    {"divergent_barrier", divergent_barrier<true>, divergent_barrier<false>, 1, 256, 256, same},
    {"barrier_in_branch", barrier_in_branch<true>, barrier_in_branch<false>, 1, 256, 256, pair},
    {"shuffle_in_branch", shuffle_in_branch<true>, shuffle_in_branch<false>, 1, 256, 256, pair_in_first_warp},
    {"shuffle_after_exit", shuffle_after_exit<true>, shuffle_after_exit<false>, 1, 256, 200, neighbour},
    {"outside_shared_memory", outside_shared_memory<true>, outside_shared_memory<false>, 1, 256, 256, same},
    {"outside_dynamic_shared_memory", outside_dynamic_shared_memory<true>,
     outside_dynamic_shared_memory<false>, 1, 256, 256, same, kElements * sizeof(float)},
    {"outside_global_memory", outside_global_memory<true>, outside_global_memory<false>, 1, 256, 256, same},
    {"misaligned_vector", misaligned_vector<true>, misaligned_vector<false>, 1, 64, 63, fourth},
    {"uninitialized_shared_memory", uninitialized_shared_memory<true>, uninitialized_shared_memory<false>, 1,
     256, 256, sum_of_all},
    {"sum_without_atomic", sum_without_atomic<true>, sum_without_atomic<false>, 1, 256, 1, sum_of_all},
    {"missing_grid_sync", missing_grid_sync<true>, missing_grid_sync<false>, kBlocks, 32, kBlocks, next_block,
     0, true},
    {"grid_sync_by_some", grid_sync_by_some<true>, grid_sync_by_some<false>, kBlocks, 32, kBlocks, same, 0,
     true},
    {"missing_fence", missing_fence<true>, missing_fence<false>, kBlocks, 64, 1, sum_of_blocks},
};

void* allocate(size_t bytes) {
  void* memory = nullptr;
  return posix_memalign(&memory, 16, bytes) == 0 ? memory : nullptr;
}

void run(const Case& tested, Kernel kernel) {
  auto* x = static_cast<float*>(allocate(kElements * sizeof(float)));
  auto* y = static_cast<float*>(allocate(kElements * sizeof(float)));
  for (int i = 0; i < kElements; ++i) {
    x[i] = 1 + 0.25f * static_cast<float>(i);
    y[i] = 0;
  }
  Scratch scratch{};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = tested.cooperative ? 1 : 0;
  cudaLaunchConfig_t config{};
  config.gridDim = tested.blocks;
  config.blockDim = tested.threads;
  config.dynamicSmemBytes = tested.shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, x, y, &scratch);
  if (error != cudaSuccess) {
    std::printf("%s: %s\n", cudaGetErrorName(error), cudaGetErrorString(error));
  } else {
    bool right = true;
    for (unsigned i = 0; i < tested.results; ++i) right = right && y[i] == tested.expected(x, i);
    std::printf("%s\n", right ? "right" : "wrong");
  }
  std::free(x);
  std::free(y);
}

}  // namespace

int main(int count, char** arguments) {
  for (const Case& tested : kCases) {
    if (count != 4) std::printf("%s\n", tested.name);
    if (count != 4 || std::strcmp(arguments[1], tested.name) != 0) continue;
    const bool right = std::strcmp(arguments[2], "right") == 0;
    for (int round = std::atoi(arguments[3]); round > 0; --round)
      run(tested, right ? tested.right : tested.wrong);
  }
  return 0;
}
