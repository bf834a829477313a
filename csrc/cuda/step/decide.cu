// A block per tensor adds up its chunks; the last one to finish takes the total and decides. Where a total is
// one of several processes, it leaves the scopes' sums to them, and a second launch decides. One kernel does
// all three, since its code is long: each sum and each power is compiled once, in a loop over scopes.
#include <algorithm>

#include "core/rules/table.h"
#include "cuda/launch.h"
#include "cuda/reduced_norms.h"
#include "cuda/step/decide.h"
#include "cuda/step/policies.h"
#include "cuda/step/telemetry.h"

namespace steadygrad::cuda {
namespace {

// own: the sums are all there is. leave: they are left to the other processes. reduced: they came back.
enum class Stage : uint8_t { own, leave, reduced };

struct DecideArguments {
  Stage stage;
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
  SharedArray<ScopeSums, kLanes> sums;
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

// Sums over those of the nonempty tensors [first, last) that this process counts.
__device__ ScopeSums sums_over(const DecideArguments& arguments, int32_t first, int32_t last,
                               Shared& shared) {
  const NormType type = arguments.options.norm_type;
  if (first == last) return no_sums(type);
  const int32_t* const tensors = arguments.table.nonempty + first;
  const auto counts = [&](int32_t tensor) {
    return arguments.counted == nullptr || arguments.counted[arguments.table.heads[tensor].slot] != 0;
  };
  const NormPartial sum = block_combine_in_order<4>(
      last - first, identity_of(type), shared.partials.data(),
      [&](int64_t i) { return counts(tensors[i]) ? arguments.norms.tensors[tensors[i]] : identity_of(type); },
      [&](NormPartial& a, const NormPartial& b) { combine(type, a, b); });
  if (type.kind != NormKind::general) return scope_sums(sum, sum.sums.medium);
  const double none = no_sums(type).medium;
  return scope_sums(sum, general_norm(type, last - first, shared.numbers.data(), [&](int64_t i) {
                      return counts(tensors[i]) ? arguments.norms.tensors[tensors[i]].sums.medium : none;
                    }));
}

__device__ ScopeSums sums_of(const DecideArguments& arguments, int32_t tensor) {
  if (arguments.table.heads[tensor].numel == 0) return no_sums(arguments.options.norm_type);
  const NormPartial& partial = arguments.norms.tensors[tensor];
  return scope_sums(partial, partial.sums.medium);
}

__device__ bool has_elements(const TensorTable& table, int32_t group) {
  return table.group_begin[group] != table.group_begin[group + 1];
}

// The norms that a decision is about: of this process's tensors, or of all processes' from the rows that came
// back.
struct ScopeNorms {
  const DecideArguments& arguments;

  __device__ bool reduced() const { return arguments.stage == Stage::reduced; }
  __device__ const Norm& group(int32_t g) const { return arguments.memory.groups[g]; }
  // A group counts also where only other processes have elements of it, so that all count the clip alike.
  __device__ bool has_group(int32_t g) const {
    return has_elements(arguments.table, g) || (reduced() && group(g).norm > 0);
  }
  __device__ Norm tensor(int32_t t) const {
    return one_of_all(reduced() ? arguments.table.heads[t].slot : t);
  }
  // Tensors that only other processes have a gradient of are among them: all processes keep the same state.
  __device__ int32_t count() const { return reduced() ? arguments.slots : arguments.table.tensors; }
  __device__ int32_t slot(int32_t i) const { return reduced() ? i : arguments.table.heads[i].slot; }
  __device__ Norm one_of_all(int32_t i) const {
    const ScopeSums* const tensor_rows = arguments.rows + 1 + arguments.table.groups;
    return norm_of(arguments.options.norm_type, reduced() ? tensor_rows[i] : sums_of(arguments, i));
  }
};

// Called by every thread of the block. Leaves the groups' sums to the other processes, or their norms in
// memory.groups, and returns the norm over all tensors.
__device__ Norm take_scopes(const DecideArguments& arguments, Shared& shared) {
  const NormType type = arguments.options.norm_type;
  const TensorTable& table = arguments.table;
  Norm* const norms = arguments.memory.groups;
  Norm total;
  if (arguments.stage == Stage::reduced) {
    total = reduced_total(type, arguments.rows, table.groups, shared.sums.data(), shared.numbers.data());
    for (int32_t g = threadIdx.x; g < table.groups; g += kLanes) {
      norms[g] = norm_of(type, arguments.rows[1 + g]);
    }
  } else {
    const bool leaves = arguments.stage == Stage::leave;
    // A clip by group looks at the groups, and so does a record where their limits differ.
    const bool by_group = leaves || arguments.options.clip_scope == ClipScope::group ||
                          (arguments.step.telemetry.rows != nullptr && table.groups > 1);
#pragma unroll 1
    for (int32_t g = leaves ? 0 : -1; g < (by_group ? table.groups : 0); ++g) {
      const int32_t first = g < 0 ? 0 : table.group_begin[g];
      const int32_t last = g < 0 ? table.nonempty_tensors : table.group_begin[g + 1];
      const ScopeSums sums = sums_over(arguments, first, last, shared);
      if (leaves) {
        if (threadIdx.x == 0) arguments.rows[1 + g] = sums;
        continue;
      }
      const Norm norm = norm_of(type, sums);
      if (g < 0) {
        total = norm;
      } else if (threadIdx.x == 0) {
        norms[g] = norm;
      }
    }
  }
  __syncthreads();
  return total;
}

// Called by every thread of the block, for a step that proceeds. Leaves each scope's coefficient in its row.
__device__ void apply_policies(const DecideArguments& arguments, const StepOptions& options,
                               const ScopeNorms& norms, const Norm& total) {
  const ClipPolicy& policy = arguments.step.policies.clip;
  double* const rows = arguments.step.policies.clip_rows;
  if (rows == nullptr) return;
  const int64_t size = row_size(policy);
  const double total_norm = seen_norm(options, total);
  const bool learns = is_finite(total_norm);
  const bool by_tensor = options.clip_scope == ClipScope::tensor;
  const bool by_group = options.clip_scope == ClipScope::group;
  const int32_t count = by_tensor ? norms.count() : by_group ? arguments.table.groups : 1;
  // A percentile takes the whole block for each scope.
  const bool by_block = policy.kind == PolicyKind::percentile;
  for (int32_t i = by_block ? 0 : threadIdx.x; i < count; i += by_block ? 1 : kLanes) {
    double* const row = rows + (by_tensor ? norms.slot(i) : i) * size;
    const Norm norm = by_tensor ? norms.one_of_all(i) : by_group ? norms.group(i) : total;
    if (by_block) {
      apply_percentile(policy, row, seen_norm(options, norm), learns);
    } else {
      apply_policy(policy, row, seen_norm(options, norm), total_norm, learns);
    }
  }
  __syncthreads();
}

// Called by every thread of the block; returns whether any coefficient is not 1. Groups without elements have
// none.
__device__ bool set_coefficients(const DecideArguments& arguments, const StepOptions& options,
                                 const ScopeNorms& norms, const Norm& total) {
  const TensorTable& table = arguments.table;
  const Policies& policies = arguments.step.policies;
  const bool by_tensor = options.clip_scope == ClipScope::tensor;
  const bool by_group = options.clip_scope == ClipScope::group;
  double* const coefficients = arguments.memory.coefficients;
  bool clips = false;
  for (int32_t i = threadIdx.x; i < (by_tensor ? table.tensors : table.groups); i += kLanes) {
    if (!by_tensor && !norms.has_group(i)) continue;
    const int32_t g = by_tensor ? table.heads[i].group : i;
    const Norm norm = by_tensor ? norms.tensor(i) : by_group ? norms.group(i) : total;
    double coefficient = scope_coefficient(arguments.groups[g], options, norm);
    // A param group's own limit is a cap on the policy's.
    if (policies.clip_rows != nullptr) {
      const int32_t slot = by_tensor ? table.heads[i].slot : 0;
      const double chosen =
          policies.clip_rows[scope_of(options.clip_scope, g, slot) * row_size(policies.clip)];
      coefficient = chosen < coefficient ? chosen : coefficient;
    }
    coefficients[i] = coefficient;
    clips = clips || coefficient != 1;
  }
  return __syncthreads_or(clips ? 1 : 0) != 0;
}

// Returns whether a unit is clipped, and resets that for the next step. Called by every thread.
__device__ bool take_units_clip(const DecideArguments& arguments) {
  if (!clips_units(arguments.step.policies)) return false;
  const bool clips = arguments.table.arrived[1] != 0;
  __syncthreads();
  if (threadIdx.x == 0) arguments.table.arrived[1] = 0;
  return clips;
}

// Returns the bias corrections for the step that may be taken: a power or two, which its own block computes.
__device__ StepScalars next_scalars(const DecideArguments& arguments, int32_t tensor) {
  const TensorHead head = arguments.table.heads[tensor];
  double step = 0;
  double numbers[kMaxNumbers] = {};
  if (arguments.table.counters != nullptr) {
    const StepCounter counter = arguments.table.counters[tensor];
    step = 1 + counter.step.value();
#pragma unroll
    for (int i = 0; i < kMaxNumbers; ++i) {
      if (counter.numbers[i].data != nullptr) numbers[i] = counter.numbers[i].value();
    }
  }
  StepScalars scalars =
      step_scalars(arguments.options.rule, arguments.groups[head.group].hyper, step, numbers);
  scalars.first = arguments.step.taken != nullptr && arguments.step.taken[head.slot] == 0;
  return scalars;
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

// Leaves what the processes combine.
__device__ void leave_rows(const DecideArguments& arguments, Shared& shared) {
  const TensorTable& table = arguments.table;
  ScopeSums flags;
  flags.medium = must_skip(arguments) ? 1 : 0;
  flags.nonfinite = block_combine_in_order<4>(
      table.tensors, 0.0, shared.numbers.data(),
      [&](int64_t t) { return static_cast<double>(arguments.norms.tensors[t].nonfinite); },
      [](double& a, double b) { a += b; });
  if (threadIdx.x == 0) arguments.rows[0] = flags;
  if (!arguments.per_tensor) return;
  ScopeSums* const tensor_rows = arguments.rows + 1 + table.groups;
  for (int32_t s = threadIdx.x; s < arguments.slots; s += kLanes) {
    tensor_rows[s] = no_sums(arguments.options.norm_type);
  }
  __syncthreads();
  for (int32_t t = threadIdx.x; t < table.tensors; t += kLanes) {
    const int32_t slot = table.heads[t].slot;
    if (arguments.counted[slot] != 0) tensor_rows[slot] = sums_of(arguments, t);
  }
}

__device__ void decide(const DecideArguments& arguments, const Norm& total, bool found_inf, Shared& shared) {
  const ScopeNorms norms{arguments};
  StepOptions options = arguments.options;
  options.found_inf = found_inf;
  if (arguments.step.grad_scale != nullptr) options.unscale = 1.0 / *arguments.step.grad_scale;
  bool skipped = is_skipped(options, total);
  const bool refused = is_refused(options, total);
  bool spiked = false;
  if (!skipped && !refused) {
    const double norm = seen_norm(options, total);
    spiked = skipped = enter_and_judge(arguments.step.policies, norm, shared.numbers.data());
  }
  if (!skipped && !refused) apply_policies(arguments, options, norms, total);
  const bool clips = set_coefficients(arguments, options, norms, total);
  const bool clipped = (take_units_clip(arguments) || clips) && !skipped && !refused;
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
    if (arguments.table.heads[t].numel != 0) continue;
    advance(arguments.table, t, next_scalars(arguments, t), arguments.step.taken);
  }
}

// Leaves the tensor's partial to the last block. Returns whether this is the last one.
__device__ bool arrive(const DecideArguments& arguments, int32_t tensor, Shared& shared) {
  __shared__ bool last;
  const NormType type = arguments.options.norm_type;
  if (tensor < arguments.table.tensors) {
    NormPartial partial = tensor_partial(arguments, tensor, shared);
    if (threadIdx.x == 0) {
      // Powers of different tensors carry different scales: from here on it is the tensor's norm.
      if (type.kind == NormKind::general) {
        partial.sums.medium = finish_norm(type, partial.sums, arguments.norms.scales[tensor]);
      }
      arguments.norms.tensors[tensor] = partial;
    }
  }
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(arguments.table.arrived, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

__global__ void __launch_bounds__(kLanes, 1)
    decide_kernel(const DecideArguments __grid_constant__ arguments) {
  __shared__ Shared shared;
  const int32_t tensor = static_cast<int32_t>(blockIdx.x);
  const Stage stage = arguments.stage;
  const bool sums_chunks = stage != Stage::reduced;
  const bool steps = arguments.options.rule != RuleKind::none;
  const bool finishes = !sums_chunks || arrive(arguments, tensor, shared);
  if (finishes) {
    const Norm total = take_scopes(arguments, shared);
    if (stage == Stage::leave) {
      leave_rows(arguments, shared);
    } else {
      decide(arguments, total, sums_chunks ? must_skip(arguments) : arguments.rows[0].medium > 0, shared);
    }
  }
  // Powers take long. Nobody waits for them here: pass 2 reads them, and in the last block they are computed
  // while the first thread writes the decision.
  if (sums_chunks && steps && threadIdx.x == kWarp && tensor < arguments.table.tensors &&
      arguments.table.heads[tensor].numel > 0) {
    arguments.memory.scalars[tensor] = next_scalars(arguments, tensor);
  }
  if (!finishes || !steps || stage == Stage::leave) return;
  __syncthreads();
  advance_empty(arguments);
}

}  // namespace

DecisionMemory take_decision_memory(const TensorTable& table, Arena& arena) {
  DecisionMemory memory;
  memory.decision = arena.take<Decision>(1);
  memory.coefficients = arena.take<double>(std::max(table.tensors, table.groups));
  memory.groups = arena.take<Norm>(table.groups);
  memory.scalars = arena.take<StepScalars>(table.tensors);
  return memory;
}

void launch_decide(const char* function, const TensorTable& table, const NormMemory& norms,
                   const DecisionMemory& memory, const StepOptions& options, const GroupOptions* groups,
                   const StepMemory& step, const Reduction& reduction, Stream stream) {
  DecideArguments arguments{Stage::own,
                            table,
                            norms,
                            memory,
                            options,
                            groups,
                            step,
                            reduction.rows,
                            nullptr,
                            reduction.slots,
                            reduction.per_tensor};
  const int64_t blocks = table.tensors > 0 ? table.tensors : 1;
  if (reduction.rows != nullptr) {
    arguments.stage = Stage::leave;
    arguments.counted = reduction.counted;
  }
  launch(function, stream, decide_kernel, blocks, kLanes, arguments);
  if (reduction.rows == nullptr) return;
  reduction.reduce();
  if (reduction.ask_policy) ask_policy(function, table.groups, options, step.policies, reduction, stream);
  arguments.stage = Stage::reduced;
  launch(function, stream, decide_kernel, 1, kLanes, arguments);
}

}  // namespace steadygrad::cuda
