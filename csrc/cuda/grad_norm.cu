// Pass 1: a warp per chunk, one partial per chunk. Thread i of the warp owns lanes 4i to 4i + 3, so that
// 16-byte loads and the order of core/norm.h go together.
#include <algorithm>

#include "cuda/grad_norm.h"
#include "cuda/halves.h"
#include "cuda/launch.h"

namespace steadygrad::cuda {
namespace {

constexpr int kNormThreads = 128;
constexpr int kWarps = kNormThreads / kWarp;

// What every launch of a call is told.
struct NormCall {
  TensorTable table;
  NormMemory memory;
  StepOptions options;
  const float* grad_scale;
  StepBroadcast broadcast;
  int32_t first_chunk;
  int32_t last_chunk;
  int32_t first_tensor;
  int32_t grads_count;
  int32_t first_group;
  int32_t groups_count;
  bool in_pairs;
};

// The arguments of a launch are copied as a whole, however many of the places are taken.
template <int kGroups, int kGrads>
struct NormArguments : NormCall {
  static constexpr int kGroupsPerLaunch = kGroups;
  static constexpr int kGradsPerLaunch = kGrads;

  GroupOptions groups[kGroups];
  void* grads[kGrads];
};
using FewArguments = NormArguments<2, 400>;
using ManyArguments = NormArguments<22, 3500>;
static_assert(sizeof(FewArguments) <= 4096, "more than a page");
static_assert(sizeof(ManyArguments) <= 32764, "more than a launch can carry");

// Rows in flight: enough loads to cover the latency of memory. Those of halves are half as long.
template <class Element>
constexpr int kRowsAtOnce = sizeof(Element) == sizeof(double)  ? 2
                            : sizeof(Element) == sizeof(float) ? 8
                                                               : 16;

// Four neighbouring elements, aligned or from anywhere.
template <class Element>
struct RowQuad {
  Quad<Element> quad;

  __device__ __forceinline__ void load(const Element* from) {
    quad = *reinterpret_cast<const Quad<Element>*>(from);
  }
  __device__ __forceinline__ void load_apart(const Element* from) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) quad.values[k] = from[k];
  }
  __device__ __forceinline__ void convert(Element (&to)[kQuad]) const {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) to[k] = quad.values[k];
  }
};

// Halves are loaded as words: loads of elements in both cases would be merged into narrow ones.
template <class Half>
struct RowOfHalves {
  uint32_t words[kQuad / 2];

  __device__ __forceinline__ void load(const Half* from) {
    const uint2 loaded = *reinterpret_cast<const uint2*>(from);
    words[0] = loaded.x;
    words[1] = loaded.y;
  }
  __device__ __forceinline__ void load_apart(const Half* from) {
#pragma unroll
    for (int w = 0; w < kQuad / 2; ++w) words[w] = from[2 * w].bits | uint32_t{from[2 * w + 1].bits} << 16;
  }
  __device__ __forceinline__ void convert(float (&to)[kQuad]) const {
#pragma unroll
    for (int w = 0; w < kQuad / 2; ++w) unpack<Half>(words[w], to[2 * w], to[2 * w + 1]);
  }
};
template <>
struct RowQuad<BFloat16> : RowOfHalves<BFloat16> {};
template <>
struct RowQuad<Float16> : RowOfHalves<Float16> {};

template <class Elements, class T, class Element, class Sums>
__device__ __forceinline__ void sum_squares(const TensorOperands& tensor, const Chunk& chunk,
                                            const GradientTransform<T>& transform, Sums& sums) {
  const int lane = threadIdx.x % kWarp;
  const int64_t begin = chunk.begin + lane * kQuad;
  const Element* const grads = elements_of<const Element>(tensor.grad) + begin;
  const bool aligned = is_aligned<Element>(tensor.grad);
  const bool keeps = transform.keeps_gradient_before_clip();
  const bool penalised = transform.penalty_before_clip.active();
  const auto add_rows = [&](int32_t row, auto at_once) {
    constexpr int kRows = decltype(at_once)::value;
    RowQuad<Element> raw[kRows];
    if (aligned) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) raw[r].load(grads + (row + r) * kLanes);
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r) raw[r].load_apart(grads + (row + r) * kLanes);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      T values[kQuad];
      raw[r].convert(values);
      if (!keeps) {
        T param[kQuad] = {};
        if (penalised) Elements::template load_quad<T>(tensor.param, begin + (row + r) * kLanes, param);
#pragma unroll
        for (int k = 0; k < kQuad; ++k) values[k] = transform.before_clip(values[k], param[k]);
      }
#pragma unroll
      for (int k = 0; k < kQuad; ++k) sums.add_square(k, values[k]);
    }
  };
  const int32_t rows = chunk.count / kLanes;
  int32_t row = 0;
  for (; row + kRowsAtOnce<Element> <= rows; row += kRowsAtOnce<Element>) {
    add_rows(row, std::integral_constant<int, kRowsAtOnce<Element>>());
  }
  for (; row < rows; ++row) add_rows(row, std::integral_constant<int, 1>());
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    const int32_t i = rows * kLanes + lane * kQuad + k;
    if (i >= chunk.count) continue;
    const T grad = to_compute(elements_of<const Element>(tensor.grad)[chunk.begin + i]);
    const T param = penalised ? Elements::template load<T>(tensor, tensor.param, chunk.begin + i) : T(0);
    sums.add_square(k, transform.before_clip(grad, param));
  }
}

// Any layout, dtype and kind of norm; non-finite elements are counted and taken as zero.
template <class Elements, class T>
__device__ __forceinline__ NormPartial sum_elements(const TensorOperands& tensor, const Chunk& chunk,
                                                    const GradientTransform<T>& transform, NormType type,
                                                    double scale) {
  const int lane = threadIdx.x % kWarp;
  const bool penalised = transform.penalty_before_clip.active();
  LaneSums<T> sums(type);
  NormPartial partial;
  unsigned nonfinite = 0;
  unsigned nan = 0;
  for (int32_t row = 0; row < chunk.count; row += kLanes) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      const int32_t i = row + lane * kQuad + k;
      if (i >= chunk.count) continue;
      const T grad = Elements::template load<T>(tensor, tensor.grad, chunk.begin + i);
      const T param = penalised ? Elements::template load<T>(tensor, tensor.param, chunk.begin + i) : T(0);
      const T value = transform.before_clip(grad, param);
      const bool finite = is_finite(value);
      nonfinite += finite ? 0 : 1;
      nan += value != value ? 1 : 0;
      sums.add(type, k, finite ? value : T(0), scale);
    }
  }
  for (int half = kWarp / 2; half >= 1; half /= 2) {
    nonfinite += __shfl_down_sync(kFullWarp, nonfinite, half);
    nan += __shfl_down_sync(kFullWarp, nan, half);
  }
  partial.sums = sums.combined(type);
  partial.nonfinite = nonfinite;
  partial.nan = nan;
  return partial;
}

template <class Elements, bool kSquares, class T>
__device__ __forceinline__ NormPartial chunk_norm(const TensorOperands& tensor, const Chunk& chunk,
                                                  const TransformOptions& options, NormType type,
                                                  double scale, bool in_pairs) {
  const GradientTransform<T> transform = transform_before_clip<T>(options);
  const bool penalised = transform.penalty_before_clip.active();
  if constexpr (kSquares) {
    type = NormType{NormKind::two, 2};  // known to the compiler, which then drops all other kinds
    const auto add_to = [&](auto& sums) {
      return Elements::template with_stored_type<T>([&](auto element) {
        using Element = decltype(element);
        if (!Elements::template contiguous<Element>(tensor.grad)) return false;
        if (penalised && !Elements::template quads<T>(tensor.param)) return false;
        sum_squares<Elements, T, Element>(tensor, chunk, transform, sums);
        return true;
      });
    };
    NormPartial partial;
    // Beside fp64 the norm is one of fp64, for which pairs are not good enough.
    if constexpr (!Elements::kFloat64) {
      if (in_pairs) {
        PairLanes sums;
        if (add_to(sums) && sums.combined(partial.sums.medium)) return partial;
      }
    }
    LaneSums<T> sums(type);
    if (add_to(sums)) {
      partial.sums = sums.combined(type);
      const double total = partial.sums.small + partial.sums.medium + partial.sums.large;
      // Where a sum of squares is finite, so is every element.
      if (__shfl_sync(kFullWarp, is_finite(total) ? 1 : 0, 0) != 0) return partial;
    }
  }
  return sum_elements<Elements>(tensor, chunk, transform, type, scale);
}

// Leaves the groups where later kernels find them.
template <class Arguments>
__device__ void publish_groups(const Arguments& arguments) {
  for (int32_t g = threadIdx.x; g < arguments.groups_count; g += kNormThreads) {
    GroupOptions options = arguments.groups[g];
    if (options.lr.data != nullptr) options.hyper.lr = options.lr.value();
    arguments.broadcast.groups[arguments.first_group + g] = options;
  }
}

// Blocks that a multiprocessor is to hold at least: with 4 (128 registers) it has 64 KB of loads in flight.
template <class Elements>
constexpr int kNormBlocks = Elements::kMixed ? 4 : 5;

template <class Elements, bool kSquares, class Arguments>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks<Elements>)
    grad_norm_kernel(const Arguments __grid_constant__ arguments) {
  if (blockIdx.x == 0) publish_groups(arguments);
  const int64_t index = arguments.first_chunk + int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (index >= arguments.last_chunk) return;
  const Chunk chunk = arguments.table.chunk(static_cast<int32_t>(index));
  TensorOperands tensor = arguments.table.tensor(chunk.tensor, nullptr);
  TransformOptions transform;
  if (arguments.grads_count > 0) tensor.grad.data = arguments.grads[chunk.tensor - arguments.first_tensor];
  if (arguments.groups_count > 0) {
    StepOptions options = arguments.options;
    if (arguments.grad_scale != nullptr) options.unscale = 1.0 / *arguments.grad_scale;
    transform = group_transform(arguments.groups[tensor.group - arguments.first_group], options);
  }
  const NormType type = arguments.options.norm_type;
  const double scale = arguments.memory.scales != nullptr ? arguments.memory.scales[chunk.tensor] : 1;
  NormPartial partial;
  Elements::with_compute_type(tensor, [&](auto element) {
    partial = chunk_norm<Elements, kSquares, decltype(element)>(tensor, chunk, transform, type, scale,
                                                                arguments.in_pairs);
  });
  if (threadIdx.x % kWarp != 0) return;
  if (chunk.begin == 0 && arguments.grads_count > 0)
    arguments.broadcast.grads[chunk.tensor] = tensor.grad.data;
  arguments.memory.chunks.store(static_cast<int32_t>(index), partial);
}

// For a general p: what each tensor's elements are divided by.
__global__ void __launch_bounds__(kLanes)
    norm_scale_kernel(const TensorTable table, const NormMemory memory, const NormType extreme) {
  __shared__ SharedArray<NormPartial, kLanes> lanes;
  const TensorHead head = table.heads[blockIdx.x];
  const int32_t chunks = static_cast<int32_t>((head.numel + kChunk - 1) / kChunk);
  NormPartial identity;
  identity.sums.medium = norm_identity(extreme);
  const NormPartial partial = block_combine_in_order<16>(
      chunks, identity, lanes.data(),
      [&](int64_t i) { return memory.chunks.load<false>(head.first_chunk + i); },
      [&](NormPartial& a, const NormPartial& b) { combine(extreme, a, b); });
  if (threadIdx.x == 0) memory.scales[blockIdx.x] = scale_for(partial.sums.medium);
}

// Whether pass 1 would wait for sums in fp64 rather than for memory. The ratio is 2 on GPUs made for fp64,
// and 32 or more on all others.
bool is_fp64_slow(const char* function, Stream stream) {
  int ratio = 0;
  check(cudaDeviceGetAttribute(&ratio, cudaDevAttrSingleToDoublePrecisionPerfRatio, stream.device), function);
  return ratio > 8;
}

template <class Arguments>
void launch_partials(const char* function, const Tensors& tensors, const NormCall& call,
                     const std::vector<GroupOptions>& groups, bool brings_grads, Stream stream) {
  constexpr int32_t kGroupsPerLaunch = Arguments::kGroupsPerLaunch;
  constexpr int32_t kGradsPerLaunch = Arguments::kGradsPerLaunch;
  Arguments arguments{};
  static_cast<NormCall&>(arguments) = call;
  const int32_t count = arguments.table.tensors;
  const int32_t group_count = static_cast<int32_t>(groups.size());
  int32_t chunks = 0;
  int32_t next = 0;
  int32_t next_group = 0;
  // All groups are brought, also those without tensors: decisions and records look at their limits.
  do {
    arguments.first_tensor = next;
    arguments.first_chunk = chunks;
    arguments.first_group = next_group;
    arguments.grads_count = 0;
    for (; next < count; ++next) {
      if (brings_grads && arguments.grads_count == kGradsPerLaunch) break;
      if (!groups.empty() && tensors[next].group >= next_group + kGroupsPerLaunch) break;
      if (brings_grads) arguments.grads[arguments.grads_count++] = tensors[next].grad.data;
      chunks += static_cast<int32_t>((tensors[next].numel + kChunk - 1) / kChunk);
    }
    arguments.last_chunk = chunks;
    // The group of the next tensor may have had some of its tensors in this launch.
    const int32_t wanted = next < count && !groups.empty() ? tensors[next].group + 1 : group_count;
    const int32_t last_group = std::min(wanted, next_group + kGroupsPerLaunch);
    arguments.groups_count = last_group - next_group;
    std::copy_n(groups.begin() + next_group, arguments.groups_count, arguments.groups);
    next_group = next < count && !groups.empty() ? std::min(tensors[next].group, last_group) : last_group;
    // One block at least: it brings the groups to the device also where all tensors are empty.
    const int64_t blocks = std::max<int64_t>(1, blocks_for(chunks - arguments.first_chunk, kWarps));
    with_contents(arguments.table.contents, [&](auto elements) {
      const auto kernel = arguments.options.norm_type.kind == NormKind::two
                              ? grad_norm_kernel<decltype(elements), true, Arguments>
                              : grad_norm_kernel<decltype(elements), false, Arguments>;
      launch(function, stream, kernel, blocks, kNormThreads, arguments);
    });
  } while (next < count || next_group < group_count);
}

}  // namespace

NormMemory take_norm_memory(const TensorTable& table, NormType type, Arena& arena) {
  NormMemory memory;
  if (table.contents == Contents::any && type.kind == NormKind::two) {
    memory.chunks.small = arena.take<double>(table.chunks);
    memory.chunks.large = arena.take<double>(table.chunks);
  }
  memory.chunks.medium = arena.take<double>(table.chunks);
  memory.chunks.counts = arena.take<uint32_t>(table.chunks);
  memory.tensors = arena.take<NormPartial>(table.tensors);
  if (type.kind == NormKind::general) memory.scales = arena.take<double>(table.tensors);
  return memory;
}

void launch_grad_norm(const char* function, const Tensors& tensors, const TensorTable& table,
                      const NormMemory& memory, const StepOptions& options, const float* grad_scale,
                      const std::vector<GroupOptions>& groups, const StepBroadcast& broadcast,
                      Stream stream) {
  NormCall call{};
  call.table = table;
  call.memory = memory;
  call.options = options;
  call.grad_scale = grad_scale;
  call.broadcast = broadcast;
  call.in_pairs = is_fp64_slow(function, stream);
  const bool brings_grads = broadcast.grads != nullptr;
  const auto launch_call = [&] {
    const bool few = static_cast<int>(groups.size()) <= FewArguments::kGroupsPerLaunch &&
                     (!brings_grads || table.tensors <= FewArguments::kGradsPerLaunch);
    const auto launch_with = few ? launch_partials<FewArguments> : launch_partials<ManyArguments>;
    launch_with(function, tensors, call, groups, brings_grads, stream);
  };
  if (options.norm_type.kind == NormKind::general) {
    call.options.norm_type = norm_type(options.norm_type.p > 0 ? INFINITY : -INFINITY);
    call.memory.scales = nullptr;
    launch_call();
    launch(function, stream, norm_scale_kernel, table.tensors, kLanes, table, memory, call.options.norm_type);
    call.options.norm_type = options.norm_type;
    call.memory.scales = memory.scales;
  }
  launch_call();
}

}  // namespace steadygrad::cuda
