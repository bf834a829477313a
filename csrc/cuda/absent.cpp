// Linked in place of the backend where steadygrad is built without CUDA.
#include <stdexcept>

#include "cuda/batch_norm/batch_norm.h"
#include "cuda/operations.h"

namespace steadygrad::cuda {
namespace {

[[noreturn]] void refuse() { throw std::runtime_error("steadygrad: built without CUDA"); }

}  // namespace

void grad_norm(const Tensors&, NormType, const NormOutput&, const Reduction&, const Allocate&, Stream) {
  refuse();
}
void clip_grad_norm(const Tensors&, double, NormType, bool, const NormOutput&, const Reduction&,
                    const Allocate&, Stream) {
  refuse();
}
void clip_grads_with_norm(const Tensors&, double, DeviceNumber, const Allocate&, Stream) { refuse(); }
void transform_grads(const Tensors&, const TransformOptions&, const Allocate&, Stream) { refuse(); }
void add_penalty(const Tensors&, double, double, double*, const Allocate&, Stream) { refuse(); }
void soft_threshold(const Tensors&, double, const Allocate&, Stream) { refuse(); }
void StepPlan::step(const Tensors&, const std::vector<StepCounter>&, const std::vector<DeviceGroup>&,
                    const StepOptions&, const StepMemory&, const Reduction&, const Allocate&, Stream) {
  refuse();
}

void batch_norm_statistics(const BatchNorm&, double*, const Allocate&, Stream) { refuse(); }
void batch_norm_forward(const BatchNorm&, const BatchNormOutput&, double*, const RunningStatistics&,
                        const Allocate&, Stream) {
  refuse();
}
void batch_norm_normalize(const BatchNorm&, const BatchNormOutput&, Stream) { refuse(); }
void batch_norm_combine(const double*, int64_t, int64_t, double*, const RunningStatistics&, Stream) {
  refuse();
}
void batch_norm_backward(const BatchNorm&, const BatchNormGradient&, bool, const Allocate&, Stream) {
  refuse();
}
void batch_norm_backward_sums(const BatchNorm&, const BatchNormGradient&, double*, const Allocate&, Stream) {
  refuse();
}
void batch_norm_backward_input(const BatchNorm&, const BatchNormGradient&, const double*, const double*,
                               Stream) {
  refuse();
}

int64_t launch_count() { return 0; }

Devices devices() { return Devices::none; }

BackendInfo backend_info() { return {}; }

}  // namespace steadygrad::cuda
