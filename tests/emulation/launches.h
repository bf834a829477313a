// How many kernels have been launched.
#pragma once

#include <cstdint>

namespace steadygrad::emulation {

// The number of launch calls of this process that succeeded.
uint64_t launch_count();

}  // namespace steadygrad::emulation
