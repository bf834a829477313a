// Between the passes: what a clip policy that lives outside is told.
#include "cuda/launch.h"
#include "cuda/reduced_norms.h"
#include "cuda/step/policies.h"

namespace steadygrad::cuda {
namespace {

struct AskArguments {
  const ScopeSums* rows;
  int32_t groups;
  int32_t slots;
  StepOptions options;
  Policies policies;
};

// Only the device knows whether the step will be taken: where it will not, the norms are NaN.
__global__ void __launch_bounds__(kLanes, 1)
    policy_norms_kernel(const AskArguments __grid_constant__ arguments) {
  __shared__ SharedArray<ScopeSums, kLanes> lanes;
  __shared__ SharedArray<double, kLanes> numbers;
  StepOptions options = arguments.options;
  options.found_inf = arguments.rows[0].medium > 0;
  const NormType type = options.norm_type;
  const Norm total = reduced_total(type, arguments.rows, arguments.groups, lanes.data(), numbers.data());
  const bool stays = is_skipped(options, total) || is_refused(options, total) ||
                     is_spiked(arguments.policies, seen_norm(options, total), numbers.data());
  const auto leave = [&](int64_t scope, const Norm& norm) {
    double* const row = arguments.policies.clip_rows + scope * row_size(arguments.policies.clip);
    row[kGivenNorm] = stays ? NAN : seen_norm(options, norm);
  };
  if (options.clip_scope == ClipScope::global) {
    if (threadIdx.x == 0) leave(0, total);
    return;
  }
  const bool per_group = options.clip_scope == ClipScope::group;
  const ScopeSums* const rows = arguments.rows + 1 + (per_group ? 0 : arguments.groups);
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < (per_group ? arguments.groups : arguments.slots); i += kLanes) {
    leave(i, norm_of(type, rows[i]));
  }
}

}  // namespace

void ask_policy(const char* function, int32_t groups, const StepOptions& options, const Policies& policies,
                const Reduction& reduction, Stream stream) {
  if (policies.clip_rows == nullptr) return;
  launch(function, stream, policy_norms_kernel, 1, kLanes,
         AskArguments{reduction.rows, groups, reduction.slots, options, policies});
  reduction.ask_policy();
}

}  // namespace steadygrad::cuda
