// Uses every part of the CUDA interface that the emulator offers and checks what comes back.
#include <cmath>
#include <cooperative_groups.h>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <cuda_runtime.h>
#include <thread>
#include <utility>
#include <vector>

#include "cuda/tensor_table.h"
#include "emulation/execution.h"
#include "emulation/launches.h"

namespace {

namespace groups = cooperative_groups;

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, bool cooperative,
                   size_t shared_bytes, Arguments&&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative ? 1 : 0;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

// A failed check is the number of its line, kept in *failed.
__device__ void expect(bool holds, int* failed, int line = __builtin_LINE()) {
  if (!holds) atomicCAS(failed, 0, line);
}

// 48 threads: a full warp and half of one.
__global__ void warp_kernel(int* failed) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread & 31;
  const unsigned mask = __ballot_sync(thread < 32 ? ~0u : 0xffffu, 1);
  const int lanes = __popc(mask);
  expect(mask == (thread < 32 ? ~0u : 0xffffu), failed);
  expect(__activemask() == mask, failed);

  expect(__shfl_sync(mask, lane, 3) == 3, failed);
  expect(__shfl_sync(mask, lane, 9, 8) == (lane & ~7) + 1, failed);
  expect(__shfl_up_sync(mask, lane, 2) == (lane < 2 ? lane : lane - 2), failed);
  expect(__shfl_down_sync(mask, 0.5 + lane, 4, 8) == 0.5 + ((lane & 7) + 4 < 8 ? lane + 4 : lane), failed);
  expect(__shfl_xor_sync(mask, static_cast<float>(lane), 5) == static_cast<float>(lane ^ 5), failed);
  expect(__shfl_xor_sync(mask, lane + (1LL << 40), 1) == (lane ^ 1) + (1LL << 40), failed);
  expect(__shfl_xor_sync(mask, lane + (1ULL << 63), 8, 16) == (lane ^ 8) + (1ULL << 63), failed);

  expect(__any_sync(mask, lane == 5) != 0, failed);
  expect(__all_sync(mask, lane == 5) == 0, failed);
  expect(__all_sync(mask, 1) != 0, failed);
  expect(__ballot_sync(mask, lane % 2) == (mask & 0xaaaaaaaau), failed);
  expect(__popc(__match_any_sync(mask, lane & 3)) == lanes / 4, failed);
  expect((__match_any_sync(mask, lane / 2) & 3u << lane / 2 * 2) == 3u << lane / 2 * 2, failed);

  expect(__reduce_add_sync(mask, 2) == 2 * lanes, failed);
  expect(__reduce_min_sync(mask, -lane) == 1 - lanes, failed);
  expect(__reduce_max_sync(mask, static_cast<unsigned>(lane)) == static_cast<unsigned>(lanes) - 1, failed);
  expect(__reduce_or_sync(mask, 1u << lane) == mask, failed);
  expect(__reduce_and_sync(mask, ~(1u << lane)) == ~mask, failed);
  expect(__reduce_xor_sync(mask, 1u) == 0u, failed);

  // Halves of a warp that go different ways, each with a mask of its own.
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  int sum = lane;
  if (lane < 16) {
    for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(half, sum, offset);
  } else {
    for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(half, sum, offset);
  }
  expect(sum == (lane < 16 ? 120 : 376), failed);

  // A whole warp and then its parts, again and again: no lane may see what another brought to a later call.
  for (int round = 0; round < 8; ++round) {
    expect(__shfl_sync(mask, lane + round, lane ^ 15) == (lane ^ 15) + round, failed);
    expect(__shfl_sync(half, 100 * lane + round, lane ^ 1) == 100 * (lane ^ 1) + round, failed);
  }
}

// Lanes that have left, or leave now, are not waited for.
__global__ void leaving_kernel(int* failed) {
  __shared__ unsigned values[32];
  const unsigned lane = threadIdx.x % 32;
  if (threadIdx.x >= 32 || lane % 4 == 3) return;
  values[lane] = lane;
  __syncwarp();
  expect(lane % 4 == 2 || values[lane ^ 1] == (lane ^ 1), failed);
  if (lane % 4 == 2) return;
  __syncwarp();
  const unsigned active = __activemask();
  expect((active & 0xccccccccu) == 0 && (active >> lane & 1) != 0, failed);
}

__global__ void block_kernel(int* failed) {
  const int thread = static_cast<int>(threadIdx.x);
  expect(threadIdx.y == 0 && blockDim.x == 48 && gridDim.x == 3 && blockIdx.x < 3 && warpSize == 32, failed);
  expect(__syncthreads_count(thread < 40) == 40, failed);
  expect(__syncthreads_or(thread == 47) != 0, failed);
  expect(__syncthreads_and(thread != 47) == 0, failed);

  __shared__ unsigned largest;
  __shared__ unsigned count;
  __shared__ __align__(16) float4 vectors[48];
  if (thread == 0) largest = count = 0;
  __syncthreads();
  atomicMax(&largest, threadIdx.x);
  atomicAdd(&count, 1u);
  vectors[thread] = make_float4(thread, thread + 1, thread + 2, thread + 3);
  __syncthreads();
  expect(largest == 47 && count == 48, failed);
  expect(vectors[47 - thread].w == 47 - thread + 3, failed);

  // Some of the threads leave; the barrier waits for the others.
  if (thread >= 40) return;
  vectors[thread].x = thread;
  __syncthreads();
  expect(vectors[39 - thread].x == 39 - thread, failed);
}

__global__ void group_kernel(int* failed) {
  const auto block = groups::this_thread_block();
  const auto tile = groups::tiled_partition<16>(block);
  const int thread = static_cast<int>(threadIdx.x);
  expect(block.size() == 48 && block.thread_rank() == threadIdx.x && block.group_index().x == blockIdx.x,
         failed);
  expect(tile.size() == 16 && tile.thread_rank() == threadIdx.x % 16, failed);
  expect(tile.meta_group_rank() == threadIdx.x / 16 && tile.meta_group_size() == 3, failed);

  int sum = thread;
  for (unsigned offset = 8; offset > 0; offset /= 2) sum += tile.shfl_down(sum, offset);
  sum = tile.shfl(sum, 0);
  expect(sum == 120 + 16 * (thread & ~15), failed);
  expect(tile.shfl_xor(thread, 3) == (thread ^ 3), failed);
  expect(tile.shfl_up(thread, 1) == (thread % 16 == 0 ? thread : thread - 1), failed);
  expect(tile.ballot(tile.thread_rank() < 3) == 7u, failed);
  expect(tile.any(thread == 0) == (thread < 16) && tile.all(1), failed);
  tile.sync();
  block.sync();
  groups::sync(block);
  const auto grid = groups::this_grid();
  expect(!grid.is_valid() && grid.num_blocks() == 3 && grid.block_rank() == blockIdx.x, failed);
  expect(grid.size() == 144 && grid.thread_rank() == blockIdx.x * 48 + threadIdx.x, failed);
}

struct Memory {
  int integer;
  unsigned word;
  unsigned counter;
  float real;
  double precise;
  unsigned long long large;
  float4 vector;
};

__global__ void atomic_kernel(Memory* memory, int* failed) {
  atomicAdd(&memory->integer, 2);
  atomicAdd(&memory->real, 0.5f);
  atomicAdd(&memory->precise, 0.25);
  atomicAdd(&memory->large, 1ULL << 33);
  atomicOr(&memory->word, 1u << threadIdx.x % 32);
  expect(atomicInc(&memory->counter, 6) <= 6, failed);
  __syncthreads();
  if (threadIdx.x != 0) return;
  expect(memory->integer == 96 && memory->real == 24.0f && memory->precise == 12.0, failed);
  expect(memory->large == 48ULL << 33 && memory->word == ~0u && memory->counter == 48 % 7, failed);
  expect(atomicSub(&memory->integer, 6) == 96 && atomicMin(&memory->integer, 7) == 90, failed);
  expect(atomicMax(&memory->integer, 9) == 7 && atomicExch(&memory->integer, 5) == 9, failed);
  expect(atomicCAS(&memory->integer, 4, 1) == 5 && atomicCAS(&memory->integer, 5, 1) == 5, failed);
  expect(atomicAnd(&memory->word, 0xffu) == ~0u && atomicXor(&memory->word, 1u) == 0xffu, failed);
  expect(atomicDec(&memory->counter, 9) == 6 && memory->word == 0xfeu && memory->integer == 1, failed);

  __stcs(&memory->vector, make_float4(1, 2, 3, 4));
  expect(__ldcs(&memory->vector).y == 2 && __ldg(&memory->real) == 24.0f, failed);
  __stcg(&memory->real, 3);
  expect(__ldcg(&memory->real) == 3 && __ldca(&memory->integer) == 1, failed);
  __stwt(&memory->real, 4);
  expect(__ldcv(&memory->real) == 4 && __ldlu(&memory->real) == 4, failed);
  __stwb(&memory->precise, 5);
  expect(__ldg(&memory->precise) == 5, failed);
}

__global__ void math_kernel(int* failed) {
  expect(__float_as_int(1.0f) == 0x3f800000 && __int_as_float(0x3f800000) == 1.0f, failed);
  expect(__float_as_uint(-0.0f) == 0x80000000u && __uint_as_float(0x40000000u) == 2.0f, failed);
  expect(__double_as_longlong(1.0) == 0x3ff0000000000000 && __longlong_as_double(0) == 0.0, failed);
  expect(__double2hiint(1.0) == 0x3ff00000 && __double2loint(1.0) == 0, failed);
  expect(__hiloint2double(0x40000000, 0) == 2.0, failed);
  expect(__popc(255u) == 8 && __popcll(~0ull) == 64 && __clz(1) == 31 && __clz(0) == 32, failed);
  expect(__clzll(1) == 63 && __ffs(8) == 4 && __ffs(0) == 0 && __ffsll(1LL << 40) == 41, failed);
  expect(__umulhi(1u << 31, 6u) == 3u && min(3u, 5u) == 3u && max(1.0f, 2.0f) == 2.0f && min(2, 3u) == 2u,
         failed);
  expect(rsqrtf(4.0f) == 0.5f && rsqrt(16.0) == 0.25 && __saturatef(3.0f) == 1.0f, failed);
  expect(__fmul_rn(2, 3) == 6 && __fadd_rn(2, 3) == 5 && __fmaf_rn(2, 3, 4) == 10, failed);
  expect(__dmul_rn(2, 3) == 6 && __dadd_rn(2, 3) == 5 && __fma_rn(2, 3, 4) == 10, failed);
  expect(__fsqrt_rn(9) == 3 && __frcp_rn(4) == 0.25f && __fdividef(1, 4) == 0.25f && __dsqrt_rn(9) == 3,
         failed);
  expect(fabsf(__expf(1.0f) - 2.7182817f) < 1e-6f && fabsf(__logf(2.0f) - 0.6931472f) < 1e-6f, failed);
  expect(isfinite(1.0f) && isnan(nanf("")) && fmaxf(1, 2) == 2 && fminf(1, 2) == 1, failed);
  expect(max(nanf(""), 1.0f) == 1.0f && min(2.0, nan("")) == 2.0, failed);
  const long long before = clock64();
  expect(clock64() >= before, failed);
}

// Threads in three dimensions, and a parameter that is one object for the whole grid.
struct Parameters {
  int* failed;
  int numbers[1000];
};

__global__ void shape_kernel(const Parameters __grid_constant__ parameters) {
  const unsigned rank = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  expect(groups::this_thread_block().thread_rank() == rank, parameters.failed);
  expect(threadIdx.x < 5 && threadIdx.y < 3 && threadIdx.z < 2 && blockIdx.y < 4 && blockIdx.z < 3,
         parameters.failed);
  expect(parameters.numbers[rank] == static_cast<int>(rank), parameters.failed);
}

// Shared memory of dynamic size; what no thread has written holds 0xff bytes.
__global__ void __launch_bounds__(64) dynamic_kernel(int count, int* failed) {
  auto* memory = static_cast<int*>(steadygrad::emulation::dynamic_shared_memory());
  for (int i = static_cast<int>(threadIdx.x); i < count; i += 64) {
    expect(memory[i] == -1, failed);
    memory[i] = i;
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < count; i += 64) {
    expect(memory[count - 1 - i] == count - 1 - i, failed);
  }
}

// A thread that waits in a loop gives another its turn, whichever of the two comes first.
__global__ void waiting_kernel(unsigned* flags) {
  const unsigned waiting = blockIdx.x == 0 ? 0 : 63;
  if (threadIdx.x == waiting) {
    while (atomicAdd(&flags[blockIdx.x], 0u) == 0) __nanosleep(20);
  } else if (threadIdx.x == 63 - waiting) {
    atomicExch(&flags[blockIdx.x], 1u);
  }
}

// Blocks that wait for each other, in turn: each lets the next one go on.
__global__ void passing_kernel(unsigned* turn, int* failed) {
  if (threadIdx.x == 0) {
    while (atomicAdd(turn, 0u) < blockIdx.x) __nanosleep(20);
    __threadfence();
    expect(atomicAdd(turn, 1u) == blockIdx.x, failed);
  }
  __syncthreads();
}

// Waits for a block that does not come.
__global__ void forsaken_kernel(unsigned* flag) {
  if (blockIdx.x == 1 && threadIdx.x == 5) __trap();
  while (blockIdx.x == 0 && atomicAdd(flag, 0u) == 0) __nanosleep(20);
}

// Batch norm over the rows of each channel: every block folds its rows into count, mean and sum of squared
// deviations; after grid.sync() it combines what all blocks found and normalizes its rows.
struct Moments {
  float count, mean, squares;
};

__device__ __forceinline__ Moments merge(Moments a, Moments b) {
  const float count = a.count + b.count;
  if (count == 0) return a;
  const float delta = b.mean - a.mean;
  const float ratio = b.count / count;
  return {count, a.mean + delta * ratio, a.squares + b.squares + delta * delta * a.count * ratio};
}

template <int kThreads>
__device__ Moments merge_block(Moments moments) {
  __shared__ Moments of_warp[kThreads / 32];
  const auto merge_warp = [](Moments own) {
    for (int offset = 16; offset > 0; offset /= 2) {
      own = merge(own, {__shfl_xor_sync(~0u, own.count, offset), __shfl_xor_sync(~0u, own.mean, offset),
                        __shfl_xor_sync(~0u, own.squares, offset)});
    }
    return own;
  };
  moments = merge_warp(moments);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = moments;
  __syncthreads();
  moments = merge_warp(threadIdx.x % 32 < kThreads / 32 ? of_warp[threadIdx.x % 32] : Moments{0, 0, 0});
  __syncthreads();
  return moments;
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    batch_norm_kernel(const float* __restrict__ x, float* __restrict__ y, Moments* partial, int rows,
                      int channels) {
  const auto grid = groups::this_grid();
  const int channel = static_cast<int>(blockIdx.y);
  const int first = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  const int stride = static_cast<int>(gridDim.x) * kThreads;
  Moments moments{0, 0, 0};
#pragma unroll 4
  for (int row = first; row < rows; row += stride) {
    const float value = __ldg(&x[row * channels + channel]);
    moments.count += 1;
    const float delta = value - moments.mean;
    moments.mean += delta / moments.count;
    moments.squares = fmaf(delta, value - moments.mean, moments.squares);
  }
  moments = merge_block<kThreads>(moments);
  if (threadIdx.x == 0) partial[channel * gridDim.x + blockIdx.x] = moments;
  grid.sync();
  Moments all{0, 0, 0};
  for (unsigned i = 0; i < gridDim.x; ++i) all = merge(all, partial[channel * gridDim.x + i]);
  const float scale = rsqrtf(all.squares / all.count + 1e-5f);
  for (int row = first; row < rows; row += stride) {
    y[row * channels + channel] = (x[row * channels + channel] - all.mean) * scale;
  }
}

double batch_norm_error() {
  constexpr int kRows = 1501;
  constexpr int kChannels = 5;
  constexpr int kBlocks = 3;
  std::vector<float> x(kRows * kChannels);
  std::vector<float> y(x.size());
  std::vector<Moments> partial(kBlocks * kChannels);
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(0.7f * i) * 3 + i % kChannels;
  if (launch(batch_norm_kernel<128>, dim3(kBlocks, kChannels), 128, true, 0, x.data(), y.data(),
             partial.data(), kRows, kChannels) != cudaSuccess) {
    return INFINITY;
  }
  double worst = 0;
  for (int channel = 0; channel < kChannels; ++channel) {
    double mean = 0;
    double squares = 0;
    for (int row = 0; row < kRows; ++row) mean += x[row * kChannels + channel] / kRows;
    for (int row = 0; row < kRows; ++row) squares += std::pow(x[row * kChannels + channel] - mean, 2);
    for (int row = 0; row < kRows; ++row) {
      const double expected = (x[row * kChannels + channel] - mean) / std::sqrt(squares / kRows + 1e-5);
      worst = std::fmax(worst, std::fabs(y[row * kChannels + channel] - expected));
    }
  }
  return worst;
}

// Looks for an element of 2^17 x 2^17 whose index and offset do not fit into 32 bits.
__global__ void large_tensor_kernel(int* failed) {
  const int64_t sizes[] = {1 << 17, 1 << 17, INT64_C(1) << 47, INT64_C(1) << 47};  // and 2^64 / size
  const int64_t strides[] = {1, INT64_C(1) << 33};
  steadygrad::cuda::TensorHead head{};
  head.numel = INT64_C(1) << 34;
  head.first_chunk = 2;
  steadygrad::cuda::TensorTable table;
  table.tensors = 1;
  table.heads = &head;
  const steadygrad::Chunk chunk = table.chunk(2 + (1 << 20));
  expect(chunk.begin == INT64_C(1) << 33 && chunk.count == steadygrad::kChunk, failed);
  steadygrad::TensorOperands tensor;
  tensor.ndim = 2;
  tensor.sizes = sizes;
  const int64_t offset = steadygrad::cuda::element_offset(tensor, strides, chunk.begin + 5);
  expect(offset == (INT64_C(1) << 16) + (INT64_C(5) << 33), failed);
}

bool report(const char* name, cudaError_t error, int failed) {
  const bool good = error == cudaSuccess && failed == 0;
  std::printf("%s: %s", name, good ? "ok" : "FAILED");
  if (failed != 0) std::printf(", line %d", failed);
  if (error != cudaSuccess) std::printf(", %s: %s", cudaGetErrorName(error), cudaGetErrorString(error));
  std::printf("\n");
  return good;
}

bool run_features() {
  bool good = true;
  const auto check = [&good](const char* name, auto kernel, dim3 blocks, dim3 threads, auto... arguments) {
    int failed = 0;
    const cudaError_t error = launch(kernel, blocks, threads, false, 0, arguments..., &failed);
    good = report(name, error, failed) && good;
  };
  Memory memory{};
  check("warp functions", warp_kernel, 3, 48);
  check("leaving lanes", leaving_kernel, 3, 48);
  check("block barriers", block_kernel, 3, 48);
  check("groups", group_kernel, 3, 48);
  check("atomics, loads and stores", atomic_kernel, 1, 48, &memory);
  check("math", math_kernel, 1, 1);
  check("elements of large tensors", large_tensor_kernel, 1, 1);

  int failed = 0;
  Parameters parameters{&failed, {}};
  for (int i = 0; i < 1000; ++i) parameters.numbers[i] = i;
  cudaError_t error = launch(shape_kernel, dim3(2, 4, 3), dim3(5, 3, 2), false, 0, parameters);
  good = report("shapes", error, failed) && good;

  constexpr int kBytes = 200 << 10;
  error = cudaFuncSetAttribute(dynamic_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error == cudaSuccess) error = launch(dynamic_kernel, 2, 64, false, kBytes, kBytes / 4, &failed);
  good = report("dynamic shared memory", error, failed) && good;

  unsigned flags[2] = {};
  good = report("waiting", launch(waiting_kernel, 2, 64, false, 0, flags), 0) && good;

  unsigned turn = 0;
  error = launch(passing_kernel, 5, 48, true, 0, &turn, &failed);
  good = report("blocks in turn", error, failed) && turn == 5 && good;
  flags[1] = 0;
  const bool noticed = launch(forsaken_kernel, 2, 48, true, 0, &flags[1]) == cudaErrorLaunchFailure;
  good = report("forsaken block", cudaSuccess, noticed ? 0 : 1) && good;

  // Two blocks of a multiprocessor share its memory.
  int resident[2] = {};
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident[0], dynamic_kernel, 64, 100 << 10);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident[1], dynamic_kernel, 64, kBytes);
  good = report("occupancy", cudaSuccess, resident[0] == 2 && resident[1] == 1 ? 0 : 1) && good;

  // Two host threads at once.
  int others[2] = {};
  std::vector<std::thread> callers;
  for (int& other : others) {
    callers.emplace_back([&other] {
      for (int i = 0; i < 20; ++i) {
        if (launch(block_kernel, 3, 48, false, 0, &other) != cudaSuccess) other = -1;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  good = report("two callers", cudaSuccess, others[0] | others[1]) && good;

  const double worst = batch_norm_error();
  std::printf("cooperative batch norm: largest error %.1e\n", worst);
  return good && worst < 1e-5;
}

}  // namespace

int main() {
  const bool good = run_features();
  std::printf("launches: %llu\n", static_cast<unsigned long long>(steadygrad::emulation::launch_count()));
  return good ? 0 : 1;
}
