// The operations on lists of gradients: norm, clip, transform.
#include "cpu/grad_norm.h"
#include "cpu/gradient.h"

namespace steadygrad::cpu {
namespace {

void leave(const Norm& norm, const NormOutput& output, bool refused = false) {
  Outcome& outcome = *output.outcome;
  outcome.norm = norm.norm;
  outcome.norm_float32 = static_cast<float>(norm.norm);
  outcome.nonfinite = norm.nonfinite;
  outcome.refused = refused ? 1 : 0;
}

}  // namespace

void grad_norm(const Tensors& tensors, NormType type, const NormOutput& output, const Reduction& reduction,
               const Allocate&, Stream) {
  leave(total_norm(tensors, ChunkTable(tensors), type, reduction), output);
}

void clip_grad_norm(const Tensors& tensors, double max_norm, NormType type, bool refuse_nonfinite,
                    const NormOutput& output, const Reduction& reduction, const BeforeWrite& before_write,
                    const Allocate&, Stream) {
  const ChunkTable table(tensors);
  const Norm norm = total_norm(tensors, table, type, reduction);
  const bool refused = refuse_nonfinite && norm.nonfinite > 0;
  TransformOptions options;
  options.clip_coefficient = clip_coefficient(max_norm, norm.norm);
  if (options.clip_coefficient != 1 && !refused) {
    before_write(true);
    transform_grads(tensors, table, [&](int32_t) { return options; });
  }
  leave(norm, output, refused);
}

void transform_grads(const Tensors& tensors, const TransformOptions& options, const Allocate&, Stream) {
  transform_grads(tensors, ChunkTable(tensors), [&](int32_t) { return options; });
}

void clip_grads_with_norm(const Tensors& tensors, double max_norm, Number total_norm,
                          const Allocate& allocate, Stream stream) {
  TransformOptions options;
  options.clip_coefficient = clip_coefficient(max_norm, total_norm.value());
  transform_grads(tensors, options, allocate, stream);
}

}  // namespace steadygrad::cpu
