// The memory that a step reads and writes besides its tensors; it is on their device, for the CPU on the
// host.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/policy.h"
#include "core/rules/hyper.h"
#include "core/telemetry.h"
#include "core/tensors.h"

namespace steadygrad {

// The result of a norm, a clip or a step.
struct Outcome {
  double norm = 0;  // the norm over all tensors
  float norm_float32 = 0;
  uint8_t skipped = 0;
  uint8_t refused =
      0;  // there were non-finite elements under NonfinitePolicy::raise, and nothing was written
  uint8_t clipped = 0;
  uint8_t spiked = 0;  // the step was skipped because of its norm
  int64_t nonfinite = 0;
};

// Where a norm is written, in the dtypes that a caller may want; null pointers are not written.
struct NormOutput {
  Outcome* outcome = nullptr;
  float* float32 = nullptr;
  double* float64 = nullptr;
};

// A tensor's step counter and the numbers of its state, if its rule has them.
struct StepCounter {
  Number step;
  Number numbers[kMaxNumbers];
};

struct StepMemory {
  const float* grad_scale = nullptr;  // null: use options.unscale
  const float* found_inf = nullptr;   // null: use options.found_inf
  NormOutput output;
  int64_t* counts = nullptr;     // skipped steps, clipped steps; null: the reader of the outcome counts them
  int32_t* taken = nullptr;      // per parameter: whether its first step has been taken
  int64_t* nonfinite = nullptr;  // per tensor of the step: non-finite elements; may be null
  uint64_t* rounded_steps = nullptr;  // steps taken so far; null: use options.rounded_steps
  Policies policies;
  Telemetry telemetry;
};

}  // namespace steadygrad
