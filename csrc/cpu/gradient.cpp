// Writes transformed gradients, for clipping in place and for the in-place step.
#include "cpu/gradient.h"

#include <algorithm>

#include "cpu/stage.h"
#include "cpu/unit_clip.h"

namespace steadygrad::cpu {
namespace {

template <class T>
void transform_chunk(const TensorOperands& tensor, const Chunk& chunk, const TransformOptions& options,
                     const TensorUnits& units) {
  const GradientTransform<T> transform = gradient_transform<T>(options);
  const bool by_unit = units.coefficients != nullptr;
  if (transform.is_identity() && !by_unit) return;
  Stage<T> grad_stage;
  Stage<T> param_stage;
  const bool in_place = Stage<T>::is_direct(tensor.grad) && !options.reads_param();
  const int64_t tile = in_place ? kChunk : kTile;
  for (int64_t done = 0; done < chunk.count; done += tile) {
    const int64_t begin = chunk.begin + done;
    const int64_t count = std::min<int64_t>(tile, chunk.count - done);
    T* grad = grad_stage.read(tensor, tensor.grad, begin, count);
    const T* param = options.reads_param() ? param_stage.read(tensor, tensor.param, begin, count) : nullptr;
    if (by_unit) {
      transform_units<T>(grad, grad, param, begin, count, options, units);
    } else {
      vector_kernels<T>().transform(grad, grad, param, count, transform);
    }
    grad_stage.write(tensor, tensor.grad, begin, count, grad);
  }
}

}  // namespace

void transform_grads(const Tensors& tensors, const ChunkTable& table, const TransformOf& transform_of,
                     const UnitsOf& units_of) {
  for_each_range(table, [&](int64_t first, int64_t last) {
    // Chunks are visited backwards, since those that pass 1 read last are still in the cache.
    for (int64_t c = last - 1; c >= first; --c) {
      const Chunk& chunk = table.chunks[c];
      const TensorOperands& tensor = tensors[chunk.tensor];
      with_compute_type(tensor, [&](auto element) {
        transform_chunk<decltype(element)>(tensor, chunk, transform_of(chunk.tensor),
                                           units_of ? units_of(chunk.tensor) : TensorUnits());
      });
    }
  });
}

}  // namespace steadygrad::cpu
