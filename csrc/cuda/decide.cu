// A block per tensor adds up its chunks; the last one to finish takes the total and decides. Where a total is
// one of several processes, it leaves the scopes' sums to them, and a second launch decides.
#include <algorithm>

#include "core/rules/table.h"
#include "cuda/decide.h"
#include "cuda/launch.h"
#include "cuda/policies.h"
#include "cuda/reduced_norms.h"
#include "cuda/telemetry.h"

namespace steadygrad::cuda {
namespace {

struct DecideArguments {
  TensorTable table;
  NormMemory norms;
  DecisionMemory memory;
  StepOptions options;
  const GroupOptions* groups;
  StepMemory step;
  ScopeSums* rows;  // null: there is one process
  const int32_t* counted;
  int32_t slots;
  bool per_tensor;
};

struct Shared {
  SharedArray<NormPartial, kLanes> partials;
  SharedArray<double, kLanes> numbers;
};

__device__ NormPartial identity_of(NormType type) {
  NormPartial identity;
  identity.sums.medium = norm_identity(type);
  return identity;
}

__device__ NormPartial tensor_partial(const DecideArguments& arguments, int32_t tensor, Shared& shared) {
  const NormType type = arguments.options.norm_type;
  const TensorHead head = arguments.table.heads[tensor];
  const int64_t count = (head.numel + kChunk - 1) / kChunk;
  const auto sum = [&](NormPartial& a, const NormPartial& b) { combine(type, a, b); };
  const ChunkPartials& chunks = arguments.norms.chunks;
  if (chunks.small != nullptr) {
    return block_combine_in_order<4>(
        count, identity_of(type), shared.partials.data(),
        [&](int64_t i) { return chunks.load<true>(static_cast<int32_t>(head.first_chunk + i)); }, sum);
  }
  return block_combine_in_order<16>(
      count, identity_of(type), shared.partials.data(),
      [&](int64_t i) { return chunks.load<false>(static_cast<int32_t>(head.first_chunk + i)); }, sum);
}

__device__ double own_norm(const DecideArguments& arguments, int32_t tensor) {
  const double scale = arguments.norms.scales != nullptr ? arguments.norms.scales[tensor] : 1;
  return finish_norm(arguments.options.norm_type, arguments.norms.tensors[tensor].sums, scale);
}

// Over those of nonempty tensors [first, last) for which counts(tensor) holds.
template <class Counts>
__device__ ScopeSums sums_over(const DecideArguments& arguments, int32_t first, int32_t last, Shared& shared,
                               Counts counts) {
  const NormType type = arguments.options.norm_type;
  if (first == last) return no_sums(type);
  const int32_t* const tensors = arguments.table.nonempty + first;
  const NormPartial sum = block_combine_in_order<4>(
      last - first, identity_of(type), shared.partials.data(),
      [&](int64_t i) { return counts(tensors[i]) ? arguments.norms.tensors[tensors[i]] : identity_of(type); },
      [&](NormPartial& a, const NormPartial& b) { combine(type, a, b); });
  if (type.kind != NormKind::general) return scope_sums(sum, sum.sums.medium);
  const double none = no_sums(type).medium;
  return scope_sums(sum, general_norm(type, last - first, shared.numbers.data(), [&](int64_t i) {
                      return counts(tensors[i]) ? own_norm(arguments, tensors[i]) : none;
                    }));
}

__device__ ScopeSums sums_of(const DecideArguments& arguments, int32_t tensor) {
  const NormType type = arguments.options.norm_type;
  if (arguments.table.heads[tensor].numel == 0) return no_sums(type);
  const NormPartial& partial = arguments.norms.tensors[tensor];
  const bool general = type.kind == NormKind::general;
  return scope_sums(partial, general ? own_norm(arguments, tensor) : partial.sums.medium);
}

__device__ bool has_elements(const TensorTable& table, int32_t group) {
  return table.group_begin[group] != table.group_begin[group + 1];
}

// The norms of this process's tensors. Methods that take `shared` are for all threads of a block.
struct OwnNorms {
  const DecideArguments& arguments;

  __device__ Norm over(int32_t first, int32_t last, Shared& shared) const {
    const auto all = [](int32_t) { return true; };
    return norm_of(arguments.options.norm_type, sums_over(arguments, first, last, shared, all));
  }
  __device__ Norm total(Shared& shared) const { return over(0, arguments.table.nonempty_tensors, shared); }
  __device__ Norm group(int32_t g, Shared& shared) const {
    return over(arguments.table.group_begin[g], arguments.table.group_begin[g + 1], shared);
  }
  __device__ Norm tensor(int32_t t) const {
    return norm_of(arguments.options.norm_type, sums_of(arguments, t));
  }
  __device__ bool has_group(int32_t g) const { return has_elements(arguments.table, g); }
  __device__ int32_t count() const { return arguments.table.tensors; }
  __device__ int32_t slot(int32_t i) const { return arguments.table.heads[i].slot; }
  __device__ Norm one_of_all(int32_t i) const { return tensor(i); }
};

// Those of all processes' tensors, from the rows that came back.
struct ReducedNorms {
  const DecideArguments& arguments;
  ScopeSums* lanes;

  __device__ Norm total(Shared& shared) const {
    return reduced_total(arguments.options.norm_type, arguments.rows, arguments.table.groups, lanes,
                         shared.numbers.data());
  }
  __device__ Norm group(int32_t g, Shared&) const {
    return norm_of(arguments.options.norm_type, arguments.rows[1 + g]);
  }
  // Also where only other processes have elements: all count the clip alike.
  __device__ bool has_group(int32_t g) const {
    return has_elements(arguments.table, g) ||
           norm_of(arguments.options.norm_type, arguments.rows[1 + g]).norm > 0;
  }
  __device__ Norm tensor(int32_t t) const {
    const int32_t slot = arguments.table.heads[t].slot;
    return one_of_all(slot);
  }
  // Also tensors that only other processes have a gradient of: all processes keep the same state.
  __device__ int32_t count() const { return arguments.slots; }
  __device__ int32_t slot(int32_t i) const { return i; }
  __device__ Norm one_of_all(int32_t i) const {
    return norm_of(arguments.options.norm_type, arguments.rows[1 + arguments.table.groups + i]);
  }
};

// By every thread of the block, for a step that proceeds. Leaves each scope's coefficient in its row.
template <class Norms>
__device__ void apply_policies(const DecideArguments& arguments, const StepOptions& options,
                               const Norms& norms, const Norm& total, Shared& shared) {
  const ClipPolicy& policy = arguments.step.policies.clip;
  double* const rows = arguments.step.policies.clip_rows;
  if (rows == nullptr) return;
  const int64_t size = row_size(policy);
  const bool by_block = policy.kind == PolicyKind::percentile;
  const double total_norm = seen_norm(options, total);
  const bool learns = is_finite(total_norm);
  const auto apply = [&](int64_t scope, double norm, bool by_one) {
    double* const row = rows + scope * size;
    if (by_block) {
      apply_percentile(policy, row, norm, learns);
    } else if (by_one) {
      apply_policy(policy, row, norm, total_norm, learns);
    }
  };
  if (options.clip_scope == ClipScope::tensor) {
    const int32_t stride = by_block ? 1 : kLanes;
    for (int32_t i = by_block ? 0 : threadIdx.x; i < norms.count(); i += stride) {
      apply(norms.slot(i), seen_norm(options, norms.one_of_all(i)), true);
    }
  } else if (options.clip_scope == ClipScope::group) {
    for (int32_t g = 0; g < arguments.table.groups; ++g) {
      apply(g, seen_norm(options, norms.group(g, shared)), threadIdx.x == 0);
    }
  } else {
    apply(0, total_norm, threadIdx.x == 0);
  }
  __syncthreads();
}

// By every thread of the block; returns whether any coefficient is not 1. Groups without elements have none.
template <bool kPolicies, class Norms>
__device__ bool set_coefficients(const DecideArguments& arguments, const StepOptions& options,
                                 const Norms& norms, const Norm& total, Shared& shared) {
  const TensorTable& table = arguments.table;
  // A param group's own limit is a cap on the policy's.
  const auto capped = [&](double limited, int32_t group, int32_t slot) {
    if constexpr (kPolicies) {
      const Policies& policies = arguments.step.policies;
      if (policies.clip_rows == nullptr) return limited;
      const double chosen =
          policies.clip_rows[scope_of(options.clip_scope, group, slot) * row_size(policies.clip)];
      return chosen < limited ? chosen : limited;
    }
    return limited;
  };
  double* const coefficients = arguments.memory.coefficients;
  bool clips = false;
  if (options.clip_scope == ClipScope::tensor) {
    for (int32_t t = threadIdx.x; t < table.tensors; t += kLanes) {
      const GroupOptions& group = arguments.groups[table.heads[t].group];
      const double limited = scope_coefficient(group, options, norms.tensor(t));
      coefficients[t] = capped(limited, 0, table.heads[t].slot);
      clips = clips || coefficients[t] != 1;
    }
  } else if (options.clip_scope == ClipScope::group) {
    for (int32_t g = 0; g < table.groups; ++g) {
      if (!norms.has_group(g)) continue;
      const double limited = scope_coefficient(arguments.groups[g], options, norms.group(g, shared));
      const double coefficient = capped(limited, g, 0);
      if (threadIdx.x == 0) coefficients[g] = coefficient;
      clips = clips || coefficient != 1;
    }
  } else {
    for (int32_t g = threadIdx.x; g < table.groups; g += kLanes) {
      if (!norms.has_group(g)) continue;
      coefficients[g] = capped(scope_coefficient(arguments.groups[g], options, total), g, 0);
      clips = clips || coefficients[g] != 1;
    }
  }
  return __syncthreads_or(clips ? 1 : 0) != 0;
}

// Whether a unit is clipped; by every thread, and the next step begins anew.
__device__ bool take_units_clip(const DecideArguments& arguments) {
  if (!clips_units(arguments.step.policies)) return false;
  const bool clips = arguments.table.arrived[1] != 0;
  __syncthreads();
  if (threadIdx.x == 0) arguments.table.arrived[1] = 0;
  return clips;
}

// Bias corrections for the step that may be taken: a power or two per tensor, computed by its own block.
__device__ void prepare_step(const DecideArguments& arguments, int32_t tensor) {
  const TensorHead head = arguments.table.heads[tensor];
  double step = 0;
  if (arguments.table.counters != nullptr) {
    const StepCounter counter = arguments.table.counters[tensor];
    step = 1 + (counter.dtype == DType::float64 ? *static_cast<const double*>(counter.data)
                                                : *static_cast<const float*>(counter.data));
  }
  StepScalars scalars = step_scalars(arguments.options.rule, arguments.groups[head.group].hyper, step);
  scalars.first = arguments.step.taken != nullptr && arguments.step.taken[head.slot] == 0;
  arguments.memory.scalars[tensor] = scalars;
}

__device__ bool is_number_for(double value, bool positive) {
  return is_finite(value) && (positive ? value > 0 : value >= 0);
}

// Numbers that only the device has seen: where the host would have refused the step, it is skipped.
__device__ bool has_bad_numbers(const DecideArguments& arguments) {
  bool bad = arguments.step.grad_scale != nullptr && !is_number_for(*arguments.step.grad_scale, true);
  for (int32_t g = threadIdx.x; g < arguments.table.groups; g += kLanes) {
    bad = bad || (has_elements(arguments.table, g) && !is_number_for(arguments.groups[g].hyper.lr, false));
  }
  return __syncthreads_or(bad ? 1 : 0) != 0;
}

// Whether this process must not take the step, whatever its gradients are.
__device__ bool must_skip(const DecideArguments& arguments) {
  const bool found =
      arguments.step.found_inf != nullptr ? *arguments.step.found_inf > 0 : arguments.options.found_inf;
  return has_bad_numbers(arguments) || found;
}

// What the processes combine.
__device__ void leave_rows(const DecideArguments& arguments, Shared& shared) {
  const TensorTable& table = arguments.table;
  const auto counted = [&](int32_t t) { return arguments.counted[table.heads[t].slot] != 0; };
  ScopeSums flags;
  flags.medium = must_skip(arguments) ? 1 : 0;
  flags.nonfinite = block_combine_in_order<4>(
      table.tensors, 0.0, shared.numbers.data(),
      [&](int64_t t) { return static_cast<double>(arguments.norms.tensors[t].nonfinite); },
      [](double& a, double b) { a += b; });
  if (threadIdx.x == 0) arguments.rows[0] = flags;
  ScopeSums* const group_rows = arguments.rows + 1;
  for (int32_t g = 0; g < table.groups; ++g) {
    const ScopeSums sums =
        sums_over(arguments, table.group_begin[g], table.group_begin[g + 1], shared, counted);
    if (threadIdx.x == 0) group_rows[g] = sums;
  }
  if (!arguments.per_tensor) return;
  ScopeSums* const tensor_rows = group_rows + table.groups;
  for (int32_t s = threadIdx.x; s < arguments.slots; s += kLanes) {
    tensor_rows[s] = no_sums(arguments.options.norm_type);
  }
  __syncthreads();
  for (int32_t t = threadIdx.x; t < table.tensors; t += kLanes) {
    if (counted(t)) tensor_rows[table.heads[t].slot] = sums_of(arguments, t);
  }
}

template <bool kPolicies, class Norms>
__device__ void decide(const DecideArguments& arguments, const Norms& norms, bool found_inf, Shared& shared) {
  StepOptions options = arguments.options;
  options.found_inf = found_inf;
  if (arguments.step.grad_scale != nullptr) options.unscale = 1.0 / *arguments.step.grad_scale;
  const Norm total = norms.total(shared);
  bool skipped = is_skipped(options, total);
  const bool refused = is_refused(options, total);
  bool spiked = false;
  if constexpr (kPolicies) {
    if (!skipped && !refused) {
      const double norm = seen_norm(options, total);
      spiked = skipped = enter_and_judge(arguments.step.policies, norm, shared.numbers.data());
    }
    if (!skipped && !refused) apply_policies(arguments, options, norms, total, shared);
  }
  const bool clips = set_coefficients<kPolicies>(arguments, options, norms, total, shared);
  bool clipped = clips && !skipped && !refused;
  if constexpr (kPolicies) clipped = (take_units_clip(arguments) || clips) && !skipped && !refused;
  if (arguments.step.telemetry.rows != nullptr) {
    RecordedStep step;
    step.total = total;
    step.flags = (clipped ? kRecordedClipped : 0) | (skipped ? kRecordedSkipped : 0) |
                 (refused ? kRecordedRefused : 0) | (spiked ? kRecordedSpiked : 0);
    record(arguments.step.telemetry, arguments.table, arguments.memory.coefficients, arguments.groups,
           options, arguments.step.policies, norms, step, shared);
  }
  if (arguments.step.nonfinite != nullptr) {
    for (int32_t t = threadIdx.x; t < arguments.table.tensors; t += kLanes) {
      arguments.step.nonfinite[t] = arguments.norms.tensors[t].nonfinite;
    }
  }
  if (threadIdx.x != 0) return;
  Decision decision;
  decision.unscale = options.unscale;
  decision.rounded_steps = options.rounded_steps;
  decision.proceed = !skipped && !refused;
  decision.clips = clipped;
  decision.zero_nonfinite = zeroes_nonfinite(options, total);
  if (arguments.step.rounded_steps != nullptr) {
    decision.rounded_steps = *arguments.step.rounded_steps;
    *arguments.step.rounded_steps += decision.proceed ? 1 : 0;
  }
  *arguments.memory.decision = decision;
  Outcome outcome{};
  const bool finite_only = !skipped && !refused && options.nonfinite == NonfinitePolicy::zero;
  outcome.norm = finite_only ? total.finite_norm : total.norm;
  outcome.norm_float32 = static_cast<float>(outcome.norm);
  outcome.skipped = skipped ? 1 : 0;
  outcome.refused = refused ? 1 : 0;
  outcome.clipped = clipped ? 1 : 0;
  outcome.spiked = spiked ? 1 : 0;
  outcome.nonfinite = total.nonfinite;
  const NormOutput& output = arguments.step.output;
  *output.outcome = outcome;
  if (output.float32 != nullptr) *output.float32 = outcome.norm_float32;
  if (output.float64 != nullptr) *output.float64 = outcome.norm;
  if (arguments.step.counts != nullptr) {
    arguments.step.counts[0] += skipped ? 1 : 0;
    arguments.step.counts[1] += clipped ? 1 : 0;
  }
}

// Tensors without elements have no chunk in pass 2 that could count their step.
__device__ void advance_empty(const DecideArguments& arguments) {
  if (arguments.table.nonempty_tensors == arguments.table.tensors || !arguments.memory.decision->proceed)
    return;
  for (int32_t t = threadIdx.x; t < arguments.table.tensors; t += kLanes) {
    if (arguments.table.heads[t].numel == 0) advance(arguments.table, t, arguments.step.taken);
  }
}

template <bool kReduces, bool kPolicies>
__global__ void __launch_bounds__(kLanes, 1)
    decide_kernel(const DecideArguments __grid_constant__ arguments) {
  __shared__ Shared shared;
  __shared__ bool last;
  const int32_t tensor = static_cast<int32_t>(blockIdx.x);
  if (tensor < arguments.table.tensors) {
    const NormPartial partial = tensor_partial(arguments, tensor, shared);
    if (threadIdx.x == 0) arguments.norms.tensors[tensor] = partial;
    // By another warp than the one that the others wait for.
    const bool updates = arguments.options.rule != RuleKind::none && arguments.table.heads[tensor].numel > 0;
    if (threadIdx.x == kWarp && updates) prepare_step(arguments, tensor);
  }
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(arguments.table.arrived, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  if constexpr (kReduces) {
    leave_rows(arguments, shared);
    return;
  }
  decide<kPolicies>(arguments, OwnNorms{arguments}, must_skip(arguments), shared);
  __syncthreads();
  if (arguments.options.rule != RuleKind::none) advance_empty(arguments);
}

template <bool kPolicies>
__global__ void __launch_bounds__(kLanes, 1)
    decide_reduced_kernel(const DecideArguments __grid_constant__ arguments) {
  __shared__ Shared shared;
  __shared__ SharedArray<ScopeSums, kLanes> lanes;
  decide<kPolicies>(arguments, ReducedNorms{arguments, lanes.data()}, arguments.rows[0].medium > 0, shared);
  __syncthreads();
  if (arguments.options.rule != RuleKind::none) advance_empty(arguments);
}

}  // namespace

DecisionMemory take_decision_memory(const TensorTable& table, Arena& arena) {
  DecisionMemory memory;
  memory.decision = arena.take<Decision>(1);
  memory.coefficients = arena.take<double>(std::max(table.tensors, table.groups));
  memory.scalars = arena.take<StepScalars>(table.tensors);
  return memory;
}

void launch_decide(const char* function, const TensorTable& table, const NormMemory& norms,
                   const DecisionMemory& memory, const StepOptions& options, const GroupOptions* groups,
                   const StepMemory& step, const Reduction& reduction, Stream stream) {
  const DecideArguments arguments{table,           norms,
                                  memory,          options,
                                  groups,          step,
                                  reduction.rows,  reduction.counted,
                                  reduction.slots, reduction.per_tensor};
  const int64_t blocks = table.tensors > 0 ? table.tensors : 1;
  const bool policies = step.policies.clip_rows != nullptr || step.policies.skip_row != nullptr;
  if (reduction.rows == nullptr) {
    launch(function, stream, policies ? decide_kernel<false, true> : decide_kernel<false, false>, blocks,
           kLanes, arguments);
    return;
  }
  launch(function, stream, decide_kernel<true, false>, blocks, kLanes, arguments);
  reduction.reduce();
  if (reduction.ask_policy) ask_policy(function, table.groups, options, step.policies, reduction, stream);
  launch(function, stream, policies ? decide_reduced_kernel<true> : decide_reduced_kernel<false>, 1, kLanes,
         arguments);
}

}  // namespace steadygrad::cuda
