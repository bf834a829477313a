// The path of one read, which a call can take where its groups of channels fit on the device. Both functions
// return false, and have done nothing, where they do not fit or two reads are expected to be faster.
#pragma once

#include "core/backend.h"
#include "core/batch_norm.h"

namespace steadygrad::cuda {

bool forward_in_one_read(const BatchNorm& norm, const BatchNormOutput& out, double* statistics,
                         const RunningStatistics& running, const Allocate& allocate, Stream stream);

// The statistics have to depend on the input, and the input's gradient has to have a destination.
bool backward_in_one_read(const BatchNorm& norm, const BatchNormGradient& grad, const Allocate& allocate,
                          Stream stream);

}  // namespace steadygrad::cuda
