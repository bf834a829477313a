// Writing transformed gradients: what clipping in place and the in-place step have in common.
#include "cuda/gradient.h"
#include "cuda/launch.h"
#include "cuda/unit_clip.h"

namespace steadygrad::cuda {
namespace {

struct TransformArguments {
  TensorTable table;
  void* const* grads;
  TransformSource source;
  bool only_clips;  // nothing to do where the clip is not active
};

// So many blocks keep any device busy, and where there is nothing to write they are soon through.
constexpr int32_t kMaxBlocks = 4096;
constexpr int kQuadsAtOnce = 4;

template <class Elements, class T, class Element>
__device__ __forceinline__ int32_t transform_quads(const TensorOperands& tensor, const Chunk& chunk,
                                                   const GradientTransform<T>& transform, bool reads_param) {
  Element* const grads = elements_of<Element>(tensor.grad) + chunk.begin;
  const int32_t quads = chunk.count / kQuad;
  int32_t q = threadIdx.x;
  if (!reads_param) {
    // Several loads in flight: there is little else to do.
    for (; q + (kQuadsAtOnce - 1) * kChunkThreads < quads; q += kQuadsAtOnce * kChunkThreads) {
      T grad[kQuadsAtOnce][kQuad];
#pragma unroll
      for (int i = 0; i < kQuadsAtOnce; ++i) load_quad<T>(grads + (q + i * kChunkThreads) * kQuad, grad[i]);
#pragma unroll
      for (int i = 0; i < kQuadsAtOnce; ++i) {
#pragma unroll
        for (int k = 0; k < kQuad; ++k) grad[i][k] = transform(grad[i][k], T(0));
        store_quad<T>(grads + (q + i * kChunkThreads) * kQuad, grad[i]);
      }
    }
  }
  for (; q < quads; q += kChunkThreads) {
    T grad[kQuad];
    T param[kQuad] = {};
    load_quad<T>(grads + q * kQuad, grad);
    if (reads_param) Elements::template load_quad<T>(tensor.param, chunk.begin + q * kQuad, param);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) grad[k] = transform(grad[k], param[k]);
    store_quad<T>(grads + q * kQuad, grad);
  }
  return quads * kQuad;
}

// The elements from `done` on, wherever they lie: those of a thread are kChunkThreads apart, so that a warp
// accesses neighbours.
template <class Elements, class T, class Element>
__device__ __forceinline__ void transform_apart(const TensorOperands& tensor, const Chunk& chunk,
                                                const GradientTransform<T>& transform, bool reads_param,
                                                int32_t done) {
  Element* const grads = elements_of<Element>(tensor.grad) + chunk.begin;
  for (int32_t first = done + threadIdx.x; first < chunk.count; first += kQuad * kChunkThreads) {
    T grad[kQuad];
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      const int32_t i = first + k * kChunkThreads;
      grad[k] = i < chunk.count ? to_compute(grads[i]) : T(0);
    }
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      const int32_t i = first + k * kChunkThreads;
      if (i >= chunk.count) continue;
      const T param = reads_param ? Elements::template load<T>(tensor, tensor.param, chunk.begin + i) : T(0);
      grads[i] = to_stored<Element>(transform(grad[k], param));
    }
  }
}

template <class Elements, class T>
__device__ __forceinline__ void transform_chunk(const TensorOperands& tensor, const Chunk& chunk,
                                                const TransformOptions& options) {
  const GradientTransform<T> transform = gradient_transform<T>(options);
  if (transform.is_identity()) return;
  const bool reads_param = options.reads_param();
  const bool is_done = Elements::template with_stored_type<T>([&](auto element) {
    using Element = decltype(element);
    if (!Elements::template contiguous<Element>(tensor.grad)) return false;
    const bool by_quads =
        is_aligned<Element>(tensor.grad) && (!reads_param || Elements::template quads<T>(tensor.param));
    const int32_t done =
        by_quads ? transform_quads<Elements, T, Element>(tensor, chunk, transform, reads_param) : 0;
    transform_apart<Elements, T, Element>(tensor, chunk, transform, reads_param, done);
    return true;
  });
  if (is_done) return;
  for (int32_t i = threadIdx.x; i < chunk.count; i += kChunkThreads) {
    const int64_t index = chunk.begin + i;
    const T grad = Elements::template load<T>(tensor, tensor.grad, index);
    const T param = reads_param ? Elements::template load<T>(tensor, tensor.param, index) : T(0);
    Elements::template store<T>(tensor, tensor.grad, index, transform(grad, param));
  }
}

template <class Elements, class T>
__device__ __forceinline__ void transform_chunk_by_unit(const TensorOperands& tensor, const Chunk& chunk,
                                                        const UnitTransform<T>& transform, bool reads_param) {
  for (int32_t i = threadIdx.x; i < chunk.count; i += kChunkThreads) {
    const int64_t index = chunk.begin + i;
    const T grad = Elements::template load<T>(tensor, tensor.grad, index);
    const T param = reads_param ? Elements::template load<T>(tensor, tensor.param, index) : T(0);
    Elements::template store<T>(tensor, tensor.grad, index, transform(grad, param, index));
  }
}

template <class Elements, bool kUnits>
__global__ void __launch_bounds__(kChunkThreads, 2 * Elements::kBlocks)
    transform_kernel(const TransformArguments __grid_constant__ arguments) {
  if (!arguments.source.proceeds()) return;
  if (arguments.only_clips && !arguments.source.decision->clips) return;
  for (int32_t index = blockIdx.x; index < arguments.table.chunks; index += gridDim.x) {
    const Chunk chunk = backward_chunk(arguments.table, index);
    const TensorOperands tensor = arguments.table.tensor(chunk.tensor, arguments.grads);
    const TransformOptions options = arguments.source.of(chunk, tensor.group);
    Elements::with_compute_type(tensor, [&](auto element) {
      using T = decltype(element);
      if constexpr (kUnits) {
        const UnitTransform<T> transform = arguments.source.template by_unit<T>(chunk, tensor.group);
        transform_chunk_by_unit<Elements>(tensor, chunk, transform, options.reads_param());
      } else {
        transform_chunk<Elements, T>(tensor, chunk, options);
      }
    });
  }
}

}  // namespace

void launch_transform(const char* function, const TensorTable& table, void* const* grads,
                      const TransformSource& source, bool only_clips, Stream stream) {
  const TransformArguments arguments{table, grads, source, only_clips};
  const int32_t blocks = std::min(table.chunks, kMaxBlocks);
  if (source.units != nullptr) {
    return with_unit_contents(table.contents, [&](auto elements) {
      launch(function, stream, transform_kernel<decltype(elements), true>, blocks, kChunkThreads, arguments);
    });
  }
  with_contents(table.contents, [&](auto elements) {
    launch(function, stream, transform_kernel<decltype(elements), false>, blocks, kChunkThreads, arguments);
  });
}

}  // namespace steadygrad::cuda
