// The last error of each thread, and why the last kernel failed.
#pragma once

#include <string>

#include "emulation/runtime.h"

namespace steadygrad::emulation {

// Keeps the error for cudaGetLastError and returns it.
cudaError_t remember(cudaError_t error);

// Keeps the reason for cudaGetErrorString and returns cudaErrorLaunchFailure.
cudaError_t fail_launch(const std::string& reason);

}  // namespace steadygrad::emulation
