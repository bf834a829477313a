// L1 and L2 penalties: their gradient with their value, and the proximal step of L1.
#include "core/penalty.h"
#include "cuda/gradient.h"
#include "cuda/launch.h"

namespace steadygrad::cuda {
namespace {

struct PenaltyArguments {
  TensorTable table;
  PenaltySums* chunks;
  double l1;
  double l2;
  double* value;
};

// A warp per chunk, as in pass 1: the value's sums keep the order of core/norm.h.
template <class Elements, class T>
__device__ __forceinline__ PenaltySums add_penalty_to_chunk(const TensorOperands& tensor, const Chunk& chunk,
                                                            double l1, double l2) {
  const PenaltyGradient<T> penalty{static_cast<T>(l1), static_cast<T>(l2)};
  const int lane = threadIdx.x % kWarp;
  const bool direct = Elements::template direct<T>(tensor.grad) && Elements::template direct<T>(tensor.param);
  LaneSums<T> magnitudes(kMagnitudes);
  LaneSums<T> squares(kSquares);
  for (int32_t row = 0; row < chunk.count; row += kLanes) {
    const int64_t begin = chunk.begin + row + lane * kQuad;
    const int32_t count = min(chunk.count - row - lane * kQuad, kQuad);
    T param[kQuad] = {};
    T grad[kQuad] = {};
    if (direct && count == kQuad) {
      load_quad<T>(elements_of<const T>(tensor.param) + begin, param);
      load_quad<T>(elements_of<const T>(tensor.grad) + begin, grad);
    } else {
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        if (k >= count) continue;
        param[k] = Elements::template load<T>(tensor, tensor.param, begin + k);
        grad[k] = Elements::template load<T>(tensor, tensor.grad, begin + k);
      }
    }
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      grad[k] = penalty.added_to(grad[k], param[k]);
      magnitudes.add(kMagnitudes, k, param[k], 1);
      squares.add_square(k, param[k]);
    }
    if (!penalty.active()) continue;
    if (direct && count == kQuad) {
      store_quad<T>(elements_of<T>(tensor.grad) + begin, grad);
    } else {
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        if (k < count) Elements::template store<T>(tensor, tensor.grad, begin + k, grad[k]);
      }
    }
  }
  return {magnitudes.combined(kMagnitudes).medium, squares.combined(kSquares)};
}

template <class Elements>
__global__ void __launch_bounds__(kChunkThreads, 2 * Elements::kBlocks)
    add_penalty_kernel(const PenaltyArguments __grid_constant__ arguments) {
  const int64_t index = int64_t{blockIdx.x} * (kChunkThreads / kWarp) + threadIdx.x / kWarp;
  if (index >= arguments.table.chunks) return;
  const Chunk chunk = arguments.table.chunk(static_cast<int32_t>(index));
  const TensorOperands tensor = arguments.table.tensor(chunk.tensor, nullptr);
  PenaltySums sums;
  Elements::with_compute_type(tensor, [&](auto element) {
    sums = add_penalty_to_chunk<Elements, decltype(element)>(tensor, chunk, arguments.l1, arguments.l2);
  });
  if (threadIdx.x % kWarp == 0) arguments.chunks[index] = sums;
}

__global__ void __launch_bounds__(kLanes)
    penalty_value_kernel(const PenaltyArguments __grid_constant__ arguments) {
  __shared__ SharedArray<PenaltySums, kLanes> lanes;
  const PenaltySums sums = block_combine_in_order<8>(
      arguments.table.chunks, PenaltySums{}, lanes.data(), [&](int64_t i) { return arguments.chunks[i]; },
      [](PenaltySums& a, const PenaltySums& b) { add(a, b); });
  if (threadIdx.x == 0) *arguments.value = penalty_value(arguments.l1, arguments.l2, sums);
}

struct ThresholdArguments {
  TensorTable table;
  double amount;
};

template <class Elements, class T>
__device__ __forceinline__ void threshold_chunk(const TensorOperands& tensor, const Chunk& chunk, T amount) {
  for (int32_t i = threadIdx.x; i < chunk.count; i += kChunkThreads) {
    const T param = Elements::template load<T>(tensor, tensor.param, chunk.begin + i);
    Elements::template store<T>(tensor, tensor.param, chunk.begin + i,
                                steadygrad::soft_threshold(param, amount));
  }
}

template <class Elements>
__global__ void __launch_bounds__(kChunkThreads, 2 * Elements::kBlocks)
    soft_threshold_kernel(const ThresholdArguments __grid_constant__ arguments) {
  const Chunk chunk = arguments.table.chunk(static_cast<int32_t>(blockIdx.x));
  const TensorOperands tensor = arguments.table.tensor(chunk.tensor, nullptr);
  Elements::with_compute_type(tensor, [&](auto element) {
    using T = decltype(element);
    threshold_chunk<Elements, T>(tensor, chunk, static_cast<T>(arguments.amount));
  });
}

}  // namespace

void add_penalty(const Tensors& tensors, double l1, double l2, double* value, const Allocate& allocate,
                 Stream stream) {
  constexpr const char* kFunction = "add_penalty_";
  const DeviceGuard guard(stream.device, kFunction);
  std::vector<uint64_t> image;
  PenaltyArguments arguments{};
  void* const base = allocate_arena(allocate, [&](Arena& arena) {
    arguments.table = build_table(tensors, 1, StepEntries(), arena, image);
    arguments.chunks = arena.take<PenaltySums>(arguments.table.chunks);
  });
  arguments.l1 = l1;
  arguments.l2 = l2;
  arguments.value = value;
  upload(kFunction, image, base, stream);
  with_contents(arguments.table.contents, [&](auto elements) {
    launch(kFunction, stream, add_penalty_kernel<decltype(elements)>,
           blocks_for(arguments.table.chunks, kChunkThreads / kWarp), kChunkThreads, arguments);
  });
  launch(kFunction, stream, penalty_value_kernel, 1, kLanes, arguments);
}

void soft_threshold(const Tensors& tensors, double amount, const Allocate& allocate, Stream stream) {
  constexpr const char* kFunction = "soft_threshold_";
  const DeviceGuard guard(stream.device, kFunction);
  const TensorTable table = upload_table(kFunction, tensors, allocate, stream);
  with_contents(table.contents, [&](auto elements) {
    launch(kFunction, stream, soft_threshold_kernel<decltype(elements)>, table.chunks, kChunkThreads,
           ThresholdArguments{table, amount});
  });
}

}  // namespace steadygrad::cuda
