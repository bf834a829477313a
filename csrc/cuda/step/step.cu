// The whole optimizer step: pass 1 reads the gradients, a decision is taken on the device, pass 2 updates.
#include "cuda/launch.h"
#include "cuda/step/update.h"
#include "cuda/unit_clip.h"

namespace steadygrad::cuda {
namespace {

constexpr const char* kFunction = "step";

// Everything a step keeps in device memory, in the order in which it lies there.
struct Layout {
  TensorTable table;
  NormMemory norms;
  DecisionMemory decision;
  StepBroadcast broadcast;
  UnitMemory units;
  int64_t size;
};

Layout lay_out(const Tensors& tensors, const StepEntries& entries, const std::vector<GroupOptions>& groups,
               NormType type, bool by_unit, void* base, std::vector<uint64_t>& image) {
  Arena arena(base);
  Layout layout;
  const int32_t group_count = static_cast<int32_t>(groups.size());
  layout.table = build_table(tensors, group_count, entries, arena, image);
  if (by_unit) layout.units = take_unit_memory(tensors, groups, arena, image);
  layout.norms = take_norm_memory(layout.table, type, arena);
  layout.decision = take_decision_memory(layout.table, arena);
  layout.broadcast.groups = arena.take<GroupOptions>(group_count);
  layout.broadcast.grads = arena.take<void*>(layout.table.tensors);
  layout.size = arena.used();
  return layout;
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream.handle), &status), kFunction);
  return status != cudaStreamCaptureStatusNone;
}

template <class... Rule>
void launch_rule(RuleList<Rule...>, RuleKind kind, const UpdateArguments& arguments, Stream stream) {
  (void)((kind == Rule::kKind && (launch_update<Rule>(kFunction, arguments, stream), true)) || ...);
}

}  // namespace

void step(const Tensors& tensors, const std::vector<StepCounter>& counters,
          const std::vector<GroupOptions>& groups, const StepOptions& options, const StepMemory& memory,
          const Reduction& reduction, const BeforeWrite& before_write, StepTable& kept,
          const Allocate& allocate, Stream stream) {
  const DeviceGuard guard(stream.device, kFunction);
  const bool writes_grads = options.rule == RuleKind::none || options.write_grads;
  before_write(writes_grads);  // the device decides whether it comes to that
  const bool counts_steps = !counters.empty() && counters.front().step.data != nullptr;
  const StepEntries entries{counts_steps ? &counters : nullptr, true};
  const bool by_unit = clips_units(memory.policies);
  std::vector<uint64_t> image;
  Layout layout = lay_out(tensors, entries, groups, options.norm_type, by_unit, kept.base, image);
  if (layout.size > kept.capacity) {
    kept.base = allocate(layout.size);
    kept.capacity = layout.size;
    layout = lay_out(tensors, entries, groups, options.norm_type, by_unit, kept.base, image);
    kept.image.clear();
  }
  // A replay puts back the table it was captured with, at any time: from then on each step brings its own.
  kept.captured = kept.captured || is_capturing(stream);
  if (kept.captured || image != kept.image) {
    kept.image.clear();  // a failed upload is not taken for a good one
    upload(kFunction, image, kept.base, stream);
    kept.image = std::move(image);
  }

  launch_grad_norm(kFunction, tensors, layout.table, layout.norms, options, memory.grad_scale, groups,
                   layout.broadcast, stream);
  if (by_unit) {
    launch_unit_clip(kFunction, layout.table, layout.units, layout.broadcast, options, memory.grad_scale,
                     memory.policies.clip.level, stream);
  }
  launch_decide(kFunction, layout.table, layout.norms, layout.decision, options, layout.broadcast.groups,
                memory, reduction, stream);
  TransformSource source;
  source.decision = layout.decision.decision;
  source.coefficients = layout.decision.coefficients;
  source.groups = layout.broadcast.groups;
  source.options = options;
  source.units = layout.units.tensors;
  if (writes_grads) launch_transform(kFunction, layout.table, layout.broadcast.grads, source, false, stream);
  const UpdateArguments update{
      layout.table, layout.broadcast.grads, source, layout.decision.scalars, memory.taken, writes_grads};
  launch_rule(Rules(), options.rule, update, stream);
}

}  // namespace steadygrad::cuda
