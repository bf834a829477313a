// A whole optimizer step: pass 1 reads the gradients, then the step is decided, and pass 2 updates.
#include <algorithm>

#include "core/rules/table.h"
#include "cpu/gradient.h"
#include "cpu/policies.h"
#include "cpu/scope_norms.h"
#include "cpu/stage.h"
#include "cpu/telemetry.h"
#include "cpu/unit_clip.h"

namespace steadygrad::cpu {
namespace {

struct Decision {
  std::vector<TransformOptions> group_transforms;
  std::vector<double> clip_coefficients;  // per tensor
  bool clipped = false;

  TransformOptions transform(const TensorOperands& tensor, int32_t index) const {
    TransformOptions options = group_transforms[tensor.group];
    options.clip_coefficient = clip_coefficients[index];
    return options;
  }
};

Decision decide(const Tensors& tensors, const std::vector<GroupOptions>& groups,
                const std::vector<TransformOptions>& group_transforms, const ScopeNorms& norms,
                const StepOptions& options, const Policies& policies) {
  apply_policies(policies, options, tensors, norms);
  Decision decision;
  decision.group_transforms = group_transforms;
  for (TransformOptions& transform : decision.group_transforms) {
    transform.zero_nonfinite = zeroes_nonfinite(options, norms.total);
  }
  decision.clip_coefficients.resize(tensors.size(), 1.0);
  const auto coefficient = [&](int32_t group, int32_t place, const Norm& norm) {
    return step_coefficient(groups, policies, options, group, place, norm);
  };
  for (size_t t = 0; t < tensors.size(); ++t) {
    const TensorOperands& tensor = tensors[t];
    const Norm& norm = norms.of(options.clip_scope, static_cast<int32_t>(t), tensor.group);
    decision.clip_coefficients[t] = coefficient(tensor.group, tensor.place, norm);
    // A tensor that is empty here may have elements on other processes, and all processes have to count
    // alike.
    const bool has_elements = tensor.numel > 0 || norm.norm > 0;
    decision.clipped = decision.clipped || (decision.clip_coefficients[t] != 1 && has_elements);
  }
  if (options.clip_scope == ClipScope::tensor) return decision;
  for (size_t g = 0; g < norms.groups.size() && !decision.clipped; ++g) {
    const Norm& norm = options.clip_scope == ClipScope::global ? norms.total : norms.groups[g];
    decision.clipped = norms.groups[g].norm > 0 && coefficient(static_cast<int32_t>(g), 0, norm) != 1;
  }
  return decision;
}

// Advances the step counters, marks the first steps as taken, and returns scalars for each tensor. Bias
// corrections take two powers, so tensors with the same number of steps share them.
std::vector<StepScalars> advance(const Tensors& tensors, const std::vector<StepCounter>& counters,
                                 const std::vector<GroupOptions>& groups, RuleKind rule, int32_t* taken) {
  std::vector<StepScalars> steps(tensors.size());
  int32_t last_group = -1;
  double last_step = -1;
  double last_numbers[kMaxNumbers] = {};
  StepScalars scalars;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const int32_t g = tensors[t].group;
    const StepCounter& counter = counters[t];
    const double step = counter.step.data == nullptr ? 0 : counter.step.value() + 1;
    double numbers[kMaxNumbers] = {};
    for (int i = 0; i < kMaxNumbers; ++i) {
      if (counter.numbers[i].data != nullptr) numbers[i] = counter.numbers[i].value();
    }
    if (g != last_group || step != last_step || !std::equal(numbers, numbers + kMaxNumbers, last_numbers)) {
      scalars = step_scalars(rule, groups[g].hyper, step, numbers);
      last_group = g;
      last_step = step;
      std::copy_n(numbers, kMaxNumbers, last_numbers);
    }
    if (counter.step.data != nullptr) counter.step.set(step);
    for (int i = 0; i < kMaxNumbers; ++i) {
      if (counter.numbers[i].data != nullptr) counter.numbers[i].set(scalars.numbers[i]);
    }
    steps[t] = scalars;
    if (taken == nullptr) continue;
    steps[t].first = taken[tensors[t].place] == 0;
    taken[tensors[t].place] = 1;
  }
  return steps;
}

// Updates a chunk. `threshold` is subtracted from the parameters' magnitudes after the update; 0 subtracts
// nothing. Penalties use the parameter as it is stored, which pass 1 has seen. The rule gets the value that
// it represents.
template <class T>
void update_chunk(const TensorOperands& tensor, const Chunk& chunk, const RuleStep& step,
                  const TransformOptions& options, double threshold, const ParamStorage& storage,
                  const TensorUnits& units) {
  const GradientTransform<T> transform = gradient_transform<T>(options);
  const bool has_extra = keeps_extra(storage.rounding);
  const int states = state_count(step.kind, step.hyper);
  Stage<T> param_stage;
  Stage<T> grad_stage;
  Stage<T> state_stages[kMaxStates];
  Stage<T> extra_stage;
  bool direct = Stage<T>::is_direct(tensor.param) && Stage<T>::is_direct(tensor.grad);
  for (int s = 0; s < states; ++s) direct = direct && Stage<T>::is_direct(tensor.states[s]);
  const bool by_unit = units.coefficients != nullptr;
  const bool scales = transform.only_scales() && !by_unit;
  const int64_t size = direct && scales && threshold == 0 ? kChunk : kTile;
  for (int64_t done = 0; done < chunk.count; done += size) {
    const int64_t begin = chunk.begin + done;
    Tile<T> tile{};
    tile.count = std::min<int64_t>(size, chunk.count - done);
    tile.param = param_stage.read(tensor, tensor.param, begin, tile.count);
    tile.grad = grad_stage.read(tensor, tensor.grad, begin, tile.count);
    for (int s = 0; s < states; ++s) {
      tile.states[s] = state_stages[s].read(tensor, tensor.states[s], begin, tile.count);
    }
    ScaleFactors<T> scale = transform.clip;
    if (!scales) {
      if (by_unit) {
        transform_units<T>(grad_stage.buffer(), tile.grad, tile.param, begin, tile.count, options, units);
      } else {
        vector_kernels<T>().transform(grad_stage.buffer(), tile.grad, tile.param, tile.count, transform);
      }
      tile.grad = grad_stage.buffer();
      scale = ScaleFactors<T>();
    }
    T* extra = nullptr;
    if (has_extra) {
      extra = extra_stage.read(tensor, tensor.extra, begin, tile.count);
      vector_kernels<T>().join(tile.param, extra, tile.count, storage);
    }
    vector_kernels<T>().update(tile, step, scale);
    if (threshold != 0) vector_kernels<T>().soft_threshold(tile.param, tile.count, static_cast<T>(threshold));
    if (storage.rounding != Rounding::nearest) {
      vector_kernels<T>().split(tile.param, extra, done, tile.count, storage);
    }
    if (has_extra) extra_stage.write(tensor, tensor.extra, begin, tile.count, extra);
    param_stage.write(tensor, tensor.param, begin, tile.count, tile.param);
    for (int s = 0; s < states; ++s) {
      state_stages[s].write(tensor, tensor.states[s], begin, tile.count, tile.states[s]);
    }
  }
}

// Makes the update read the gradients as they were written, without transforming them once more.
void take_written(Decision& decision, UnitClips& units) {
  std::fill(decision.group_transforms.begin(), decision.group_transforms.end(), TransformOptions());
  std::fill(decision.clip_coefficients.begin(), decision.clip_coefficients.end(), 1.0);
  units = UnitClips();
}

bool changes_grads(const Tensors& tensors, const Decision& decision, const UnitClips& units) {
  if (units.clip()) return true;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const TransformOptions transform = decision.transform(tensors[t], static_cast<int32_t>(t));
    if (!gradient_transform<double>(transform).is_identity()) return true;
  }
  return false;
}

void leave(const Outcome& outcome, const StepMemory& memory) {
  *memory.output.outcome = outcome;
  memory.output.outcome->norm_float32 = static_cast<float>(outcome.norm);
  if (memory.counts == nullptr) return;
  memory.counts[0] += outcome.skipped;
  memory.counts[1] += outcome.clipped;
}

}  // namespace

void step(const Tensors& tensors, const std::vector<StepCounter>& counters,
          const std::vector<GroupOptions>& groups, const StepOptions& given, const StepMemory& memory,
          const Reduction& reduction, const BeforeWrite& before_write, StepTable&, const Allocate&, Stream) {
  const ChunkTable table(tensors);
  const Policies& policies = memory.policies;
  StepOptions options = given;
  if (memory.rounded_steps != nullptr) options.rounded_steps = *memory.rounded_steps;
  std::vector<TransformOptions> group_transforms;
  group_transforms.reserve(groups.size());
  for (const GroupOptions& group : groups) group_transforms.push_back(group_transform(group, options));
  const GradNorms norms(tensors, table, group_transforms, options.norm_type);
  const ScopeNorms scopes = scope_norms(tensors, norms, groups.size(), options, reduction);
  options.found_inf = scopes.found_inf;

  Outcome outcome;
  outcome.norm = scopes.total.norm;
  outcome.nonfinite = scopes.total.nonfinite;
  for (size_t t = 0; t < tensors.size() && memory.nonfinite != nullptr; ++t) {
    memory.nonfinite[t] = norms.nonfinite(t);
  }
  outcome.skipped = is_skipped(options, scopes.total) ? 1 : 0;
  outcome.refused = is_refused(options, scopes.total) ? 1 : 0;
  if (outcome.skipped == 0 && outcome.refused == 0) {
    outcome.spiked = outcome.skipped = is_spiked(policies, options, scopes.total) ? 1 : 0;
    if (outcome.spiked == 0) ask_policy(policies, options, reduction, scopes);
    enter_spike(policies, options, scopes.total);
  }
  const auto record_step = [&] {
    if (memory.telemetry.rows == nullptr) return;
    record(memory.telemetry, tensors, norms, scopes, groups, options, policies, outcome);
  };
  if (outcome.skipped != 0 || outcome.refused != 0) {
    record_step();
    return leave(outcome, memory);
  }

  Decision decision = decide(tensors, groups, group_transforms, scopes, options, policies);
  UnitClips units;
  if (clips_units(policies)) {
    units = UnitClips(tensors, groups, decision.group_transforms, policies.clip.level);
  }
  outcome.clipped = decision.clipped || units.clip() ? 1 : 0;
  if (options.nonfinite == NonfinitePolicy::zero) outcome.norm = scopes.total.finite_norm;
  const bool may_write_grads = options.rule == RuleKind::none || options.write_grads;
  const bool writes_grads = may_write_grads && changes_grads(tensors, decision, units);
  if (writes_grads || options.rule != RuleKind::none) before_write(writes_grads);
  record_step();
  leave(outcome, memory);
  if (memory.rounded_steps != nullptr) *memory.rounded_steps += 1;
  if (writes_grads) {
    transform_grads(
        tensors, table, [&](int32_t t) { return decision.transform(tensors[t], t); },
        [&](int32_t t) { return units.of(t); });
    take_written(decision, units);
  }
  if (options.rule == RuleKind::none) return;

  const std::vector<StepScalars> steps = advance(tensors, counters, groups, options.rule, memory.taken);
  for_each_range(table, [&](int64_t first, int64_t last) {
    // Chunks are visited backwards, since those that pass 1 read last are still in the cache.
    for (int64_t c = last - 1; c >= first; --c) {
      const Chunk& chunk = table.chunks[c];
      const TensorOperands& tensor = tensors[chunk.tensor];
      const GroupOptions& group = groups[tensor.group];
      const RuleStep step{options.rule, group.hyper, steps[chunk.tensor]};
      const double threshold = proximal_threshold(group, options);
      const ParamStorage storage = param_storage(options, tensor, chunk);
      with_compute_type(tensor, [&](auto element) {
        update_chunk<decltype(element)>(tensor, chunk, step, decision.transform(tensor, chunk.tensor),
                                        threshold, storage, units.of(chunk.tensor));
      });
    }
  });
}

}  // namespace steadygrad::cpu
