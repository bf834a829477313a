// L1 and L2 penalties: their gradient with their value, and the proximal step of L1.
#include "core/penalty.h"

#include <algorithm>

#include "core/backend.h"
#include "cpu/parallel.h"
#include "cpu/stage.h"

namespace steadygrad::cpu {
namespace {

template <class T>
PenaltySums add_penalty_to_chunk(const TensorOperands& tensor, const Chunk& chunk,
                                 const GradientTransform<T>& transform) {
  Stage<T> grad_stage;
  Stage<T> param_stage;
  const bool writes = !transform.is_identity();
  NormLanes magnitudes{};
  NormLanes squares{};
  for (int64_t done = 0; done < chunk.count; done += kTile) {
    const int64_t begin = chunk.begin + done;
    const int64_t count = std::min<int64_t>(kTile, chunk.count - done);
    T* grad = grad_stage.read(tensor, tensor.grad, begin, count);
    const T* param = param_stage.read(tensor, tensor.param, begin, count);
    if (writes) {
      vector_kernels<T>().transform(grad, grad, param, count, transform);
      grad_stage.write(tensor, tensor.grad, begin, count, grad);
    }
    vector_kernels<T>().accumulate_norm(magnitudes, param, count, kMagnitudes, 1);
    vector_kernels<T>().accumulate_norm(squares, param, count, kSquares, 1);
  }
  const int filled = std::min<int32_t>(chunk.count, kLanes);
  const auto reduced = [&](double* lanes) { return combine_lanes(kSquares, lanes, filled); };
  return {reduced(magnitudes.medium),
          {reduced(squares.small), reduced(squares.medium), reduced(squares.large)}};
}

}  // namespace

void add_penalty(const Tensors& tensors, double l1, double l2, double* value, const Allocate&, Stream) {
  const ChunkTable table(tensors);
  std::vector<PenaltySums> chunks(table.chunks.size());
  TransformOptions options;
  options.l1_before_clip = l1;
  options.l2_before_clip = l2;
  for_each_range(table, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const Chunk& chunk = table.chunks[c];
      const TensorOperands& tensor = tensors[chunk.tensor];
      with_compute_type(tensor, [&](auto element) {
        using T = decltype(element);
        chunks[c] = add_penalty_to_chunk<T>(tensor, chunk, gradient_transform<T>(options));
      });
    }
  });
  *value = 0;
  if (chunks.empty()) return;
  PenaltySums lanes[kLanes];
  const PenaltySums sums = combine_in_order<PenaltySums>(
      static_cast<int64_t>(chunks.size()), lanes, [&](int64_t i) { return chunks[i]; },
      [](PenaltySums& a, const PenaltySums& b) { add(a, b); });
  *value = penalty_value(l1, l2, sums);
}

void soft_threshold(const Tensors& tensors, double amount, const Allocate&, Stream) {
  const ChunkTable table(tensors);
  for_each_range(table, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const Chunk& chunk = table.chunks[c];
      const TensorOperands& tensor = tensors[chunk.tensor];
      with_compute_type(tensor, [&](auto element) {
        using T = decltype(element);
        Stage<T> stage;
        for (int64_t done = 0; done < chunk.count; done += kTile) {
          const int64_t begin = chunk.begin + done;
          const int64_t count = std::min<int64_t>(kTile, chunk.count - done);
          T* param = stage.read(tensor, tensor.param, begin, count);
          vector_kernels<T>().soft_threshold(param, count, static_cast<T>(amount));
          stage.write(tensor, tensor.param, begin, count, param);
        }
      });
    }
  });
}

}  // namespace steadygrad::cpu
