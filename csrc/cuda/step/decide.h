// Between the passes: from the chunks' partials to the norm, the decision and the clip coefficients.
#pragma once

#include "cuda/grad_norm.h"

namespace steadygrad::cuda {

// What pass 2 has to know, in device memory.
struct Decision {
  double unscale;
  uint64_t rounded_steps;  // before this step
  bool proceed;            // neither skipped nor refused
  bool clips;              // a coefficient is not 1
  bool zero_nonfinite;
};

// A tensor's step has been taken.
__device__ __forceinline__ void advance(const TensorTable& table, int32_t tensor, const StepScalars& scalars,
                                        int32_t* taken) {
  if (table.counters != nullptr) {
    const StepCounter counter = table.counters[tensor];
    counter.step.set(counter.step.value() + 1);
#pragma unroll
    for (int i = 0; i < kMaxNumbers; ++i) {
      if (counter.numbers[i].data != nullptr) counter.numbers[i].set(scalars.numbers[i]);
    }
  }
  taken[table.heads[tensor].slot] = 1;
}

struct DecisionMemory {
  Decision* decision = nullptr;
  double* coefficients = nullptr;  // per tensor or per group, as the clip's scope says
  Norm* groups = nullptr;          // per group, where a decision looks at them
  StepScalars* scalars = nullptr;  // per tensor
};

DecisionMemory take_decision_memory(const TensorTable& table, Arena& arena);

// `groups`: device memory, one per param group. With a reduction it is two launches, and what the reduction
// queues lies between them.
void launch_decide(const char* function, const TensorTable& table, const NormMemory& norms,
                   const DecisionMemory& memory, const StepOptions& options, const GroupOptions* groups,
                   const StepMemory& step, const Reduction& reduction, Stream stream);

}  // namespace steadygrad::cuda
