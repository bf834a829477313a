// One read, where a call's groups of channels fit on the device. Both functions return false, and have done
// nothing, where they do not, or where two reads are expected to be faster.
#pragma once

#include "core/backend.h"
#include "core/batch_norm.h"

namespace steadygrad::cuda {

bool forward_in_one_read(const BatchNorm& norm, const BatchNormOutput& out, double* statistics,
                         const RunningStatistics& running, const Allocate& allocate, Stream stream);

// Of statistics that depend on the input, and with a destination for the input's gradient.
bool backward_in_one_read(const BatchNorm& norm, const BatchNormGradient& grad, const Allocate& allocate,
                          Stream stream);

}  // namespace steadygrad::cuda
