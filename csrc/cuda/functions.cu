// The operations on lists of tensors: each brings its table to the device, since nothing is kept between
// calls.
#include "cuda/gradient.h"
#include "cuda/launch.h"

namespace steadygrad::cuda {
namespace {

// Norm and decision in one param group without anything but a limit.
void norm_and_clip(const char* function, const Tensors& tensors, double max_norm, NormType type,
                   NonfinitePolicy nonfinite, const NormOutput& output, const Reduction& reduction,
                   const Allocate& allocate, Stream stream) {
  const DeviceGuard guard(stream.device, function);
  std::vector<uint64_t> image;
  TensorTable table;
  NormMemory norms;
  DecisionMemory decision;
  StepBroadcast broadcast;
  void* const base = allocate_arena(allocate, [&](Arena& arena) {
    table = build_table(tensors, 1, StepEntries(), arena, image);
    norms = take_norm_memory(table, type, arena);
    decision = take_decision_memory(table, arena);
    broadcast.groups = arena.take<GroupOptions>(1);
  });
  StepOptions options;
  options.norm_type = type;
  options.nonfinite = nonfinite;
  StepMemory memory;
  memory.output = output;
  std::vector<GroupOptions> groups(1);
  groups[0].max_norm = max_norm;
  upload(function, image, base, stream);
  launch_grad_norm(function, tensors, table, norms, options, nullptr, groups, broadcast, stream);
  launch_decide(function, table, norms, decision, options, broadcast.groups, memory, reduction, stream);
  if (max_norm == INFINITY) return;
  TransformSource source;
  source.decision = decision.decision;
  source.coefficients = decision.coefficients;
  source.groups = broadcast.groups;
  source.options = options;
  launch_transform(function, table, nullptr, source, true, stream);
}

void transform_all(const char* function, const Tensors& tensors, const TransformSource& source,
                   const Allocate& allocate, Stream stream) {
  const DeviceGuard guard(stream.device, function);
  const TensorTable table = upload_table(function, tensors, allocate, stream);
  launch_transform(function, table, nullptr, source, false, stream);
}

}  // namespace

void grad_norm(const Tensors& tensors, NormType type, const NormOutput& output, const Reduction& reduction,
               const Allocate& allocate, Stream stream) {
  norm_and_clip("get_total_norm", tensors, INFINITY, type, NonfinitePolicy::propagate, output, reduction,
                allocate, stream);
}

void clip_grad_norm(const Tensors& tensors, double max_norm, NormType type, bool refuse_nonfinite,
                    const NormOutput& output, const Reduction& reduction, const BeforeWrite& before_write,
                    const Allocate& allocate, Stream stream) {
  if (max_norm < INFINITY) before_write(true);  // the device decides whether it comes to that
  const NonfinitePolicy policy = refuse_nonfinite ? NonfinitePolicy::raise : NonfinitePolicy::propagate;
  norm_and_clip("clip_grad_norm_", tensors, max_norm, type, policy, output, reduction, allocate, stream);
}

void clip_grads_with_norm(const Tensors& tensors, double max_norm, Number total_norm,
                          const Allocate& allocate, Stream stream) {
  TransformSource source;
  source.total_norm = total_norm;
  source.max_norm = max_norm;
  transform_all("clip_grads_with_norm_", tensors, source, allocate, stream);
}

void transform_grads(const Tensors& tensors, const TransformOptions& options, const Allocate& allocate,
                     Stream stream) {
  TransformSource source;
  source.fixed = options;
  transform_all("clip_grad_value_", tensors, source, allocate, stream);
}

}  // namespace steadygrad::cuda
