// A warp per unit: thread i owns lanes 4i to 4i + 3 of both norms, as in pass 1, however long the unit is.
#include "cuda/launch.h"
#include "cuda/unit_clip.h"

namespace steadygrad::cuda {
namespace {

constexpr int kUnitThreads = 128;
constexpr int kUnitWarps = kUnitThreads / kWarp;
constexpr NormType kSquares{NormKind::two, 2.0};

struct UnitArguments {
  TensorTable table;
  UnitMemory memory;
  StepBroadcast broadcast;
  StepOptions options;
  const float* grad_scale;
  double eps;
};

// The tensor that a unit belongs to: the last one whose units begin no later.
__device__ __forceinline__ int32_t tensor_of_unit(const UnitArguments& arguments, int64_t unit) {
  int32_t low = 0;
  int32_t high = arguments.table.tensors;
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (arguments.memory.tensors[middle].first <= unit) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Rows of lanes in flight.
template <class T>
constexpr int kUnitRows = sizeof(T) == sizeof(double) ? 1 : 4;

// The sums of a unit's elements [begin, begin + count).
template <class Elements, class T>
struct UnitSums {
  const TensorOperands& tensor;
  const GradientTransform<T>& transform;
  LaneSums<T> params{kSquares};
  LaneSums<T> grads{kSquares};

  __device__ __forceinline__ void add(int k, T param, T grad) {
    params.add_square(k, param);
    grads.add_square(k, transform.before_clip(grad, param));
  }

  template <int kRows>
  __device__ __forceinline__ void add_rows(int64_t index) {
    T param[kRows][kQuad];
    T grad[kRows][kQuad];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Elements::template load_quad<T>(tensor.param, index + r * kLanes, param[r]);
      Elements::template load_quad<T>(tensor.grad, index + r * kLanes, grad[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int k = 0; k < kQuad; ++k) add(k, param[r][k], grad[r][k]);
    }
  }

  __device__ __forceinline__ void add_all(int64_t begin, int64_t count) {
    const int64_t first = begin + threadIdx.x % kWarp * kQuad;
    const int64_t rows = count / kLanes;
    int64_t row = 0;
    if (begin % kQuad == 0 && Elements::template quads<T>(tensor.param) &&
        Elements::template quads<T>(tensor.grad)) {
      for (; row + kUnitRows<T> <= rows; row += kUnitRows<T>) add_rows<kUnitRows<T>>(first + row * kLanes);
      for (; row < rows; ++row) add_rows<1>(first + row * kLanes);
    }
    for (; row * kLanes < count; ++row) {
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        const int64_t index = first + row * kLanes + k;
        if (index >= begin + count) continue;
        add(k, Elements::template load<T>(tensor, tensor.param, index),
            Elements::template load<T>(tensor, tensor.grad, index));
      }
    }
  }
};

template <class Elements>
__global__ void __launch_bounds__(kUnitThreads, Elements::kBlocks)
    unit_clip_kernel(const UnitArguments __grid_constant__ arguments) {
  const int64_t index = int64_t{blockIdx.x} * kUnitWarps + threadIdx.x / kWarp;
  if (index >= arguments.memory.units) return;
  const int32_t t = tensor_of_unit(arguments, index);
  const TensorUnits units = arguments.memory.tensors[t];
  const TensorOperands tensor = arguments.table.tensor(t, arguments.broadcast.grads);
  const GroupOptions& group = arguments.broadcast.groups[tensor.group];
  StepOptions options = arguments.options;
  if (arguments.grad_scale != nullptr) options.unscale = 1.0 / *arguments.grad_scale;
  const int64_t unit = index - units.first;
  Elements::with_compute_type(tensor, [&](auto element) {
    using T = decltype(element);
    GradientTransform<T> transform = transform_before_clip<T>(group_transform(group, options));
    // Where all elements are finite, this changes nothing.
    transform.zero_nonfinite = options.nonfinite == NonfinitePolicy::zero;
    UnitSums<Elements, T> sums{tensor, transform};
    sums.add_all(unit * units.size, units.size);
    const NormSums params = sums.params.combined(kSquares);
    const NormSums grads = sums.grads.combined(kSquares);
    if (threadIdx.x % kWarp != 0) return;
    const double coefficient = unit_coefficient(
        group.clipping, arguments.eps, finish_norm(kSquares, params, 1), finish_norm(kSquares, grads, 1));
    units.coefficients[unit] = coefficient;
    if (coefficient != 1) atomicOr(arguments.table.arrived + 1, 1u);
  });
}

}  // namespace

UnitMemory take_unit_memory(const Tensors& tensors, const std::vector<GroupOptions>& groups, Arena& arena,
                            std::vector<uint64_t>& image) {
  const int64_t count = static_cast<int64_t>(tensors.size());
  const size_t words = image.size();
  UnitMemory memory;
  memory.tensors = arena.take<TensorUnits>(count);
  const char* const end = arena.take<char>(0);
  image.resize(words + (end - reinterpret_cast<const char*>(memory.tensors)) / sizeof(uint64_t), 0);
  TensorUnits* const host = reinterpret_cast<TensorUnits*>(image.data() + words);
  const auto is_clipped = [&](int64_t t) { return groups[tensors[t].group].clipping != INFINITY; };
  for (int64_t t = 0; t < count; ++t) {
    host[t] = units_of(tensors[t], memory.units);
    memory.units += is_clipped(t) ? unit_count(tensors[t]) : 0;
  }
  double* const coefficients = arena.take<double>(memory.units);
  for (int64_t t = 0; t < count; ++t) {
    if (is_clipped(t) && unit_count(tensors[t]) > 0) host[t].coefficients = coefficients + host[t].first;
  }
  return memory;
}

void launch_unit_clip(const char* function, const TensorTable& table, const UnitMemory& memory,
                      const StepBroadcast& broadcast, const StepOptions& options, const float* grad_scale,
                      double eps, Stream stream) {
  with_unit_contents(table.contents, [&](auto elements) {
    launch(function, stream, unit_clip_kernel<decltype(elements)>, blocks_for(memory.units, kUnitWarps),
           kUnitThreads, UnitArguments{table, memory, broadcast, options, grad_scale, eps});
  });
}

}  // namespace steadygrad::cuda
