// What a step reads and writes besides its tensors, in memory of their device: the host's on the CPU.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/policy.h"
#include "core/rules/hyper.h"
#include "core/telemetry.h"
#include "core/tensors.h"

namespace steadygrad {

// What a norm, a clip or a step leaves behind.
struct Outcome {
  double norm = 0;  // over all tensors
  float norm_float32 = 0;
  uint8_t skipped = 0;
  uint8_t refused = 0;  // non-finite under NonfinitePolicy::raise: nothing was written
  uint8_t clipped = 0;
  uint8_t spiked = 0;  // skipped for its norm
  int64_t nonfinite = 0;
};

// Where a norm goes, in the dtypes that a caller may want; null: nowhere.
struct NormOutput {
  Outcome* outcome = nullptr;
  float* float32 = nullptr;
  double* float64 = nullptr;
};

// A tensor's step counter and the numbers beside it, if its rule keeps them.
struct StepCounter {
  Number step;
  Number numbers[kMaxNumbers];
};

struct StepMemory {
  const float* grad_scale = nullptr;  // null: options.unscale holds
  const float* found_inf = nullptr;   // null: options.found_inf holds
  NormOutput output;
  int64_t* counts = nullptr;          // skipped steps, clipped steps; null: whoever reads the outcome counts
  int32_t* taken = nullptr;           // per parameter: whether its first step has been taken
  int64_t* nonfinite = nullptr;       // per tensor of the step, may be null
  uint64_t* rounded_steps = nullptr;  // steps taken so far; null: options.rounded_steps holds
  Policies policies;
  Telemetry telemetry;
};

}  // namespace steadygrad
