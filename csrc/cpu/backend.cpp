// The CPU's table of operations.
#include "core/backend.h"

namespace steadygrad {
namespace cpu {

// Each is defined in the file of its name or of its family, and called through the table alone.
OperationOf<decltype(Backend::grad_norm)> grad_norm;
OperationOf<decltype(Backend::clip_grad_norm)> clip_grad_norm;
OperationOf<decltype(Backend::clip_grads_with_norm)> clip_grads_with_norm;
OperationOf<decltype(Backend::transform_grads)> transform_grads;
OperationOf<decltype(Backend::add_penalty)> add_penalty;
OperationOf<decltype(Backend::soft_threshold)> soft_threshold;
OperationOf<decltype(Backend::step)> step;
OperationOf<decltype(Backend::batch_norm_statistics)> batch_norm_statistics;
OperationOf<decltype(Backend::batch_norm_forward)> batch_norm_forward;
OperationOf<decltype(Backend::batch_norm_normalize)> batch_norm_normalize;
OperationOf<decltype(Backend::batch_norm_combine)> batch_norm_combine;
OperationOf<decltype(Backend::batch_norm_backward)> batch_norm_backward;
OperationOf<decltype(Backend::batch_norm_backward_sums)> batch_norm_backward_sums;
OperationOf<decltype(Backend::batch_norm_backward_input)> batch_norm_backward_input;

}  // namespace cpu

const Backend& cpu_backend() {
  using namespace cpu;
  static constexpr Backend kBackend{false,
                                    nullptr,
                                    nullptr,
                                    grad_norm,
                                    clip_grad_norm,
                                    clip_grads_with_norm,
                                    transform_grads,
                                    add_penalty,
                                    soft_threshold,
                                    step,
                                    batch_norm_statistics,
                                    batch_norm_forward,
                                    batch_norm_normalize,
                                    batch_norm_combine,
                                    batch_norm_backward,
                                    batch_norm_backward_sums,
                                    batch_norm_backward_input};
  return kBackend;
}

}  // namespace steadygrad
