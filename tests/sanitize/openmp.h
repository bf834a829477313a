// The program's interface to its OpenMP runtime.
#pragma once

#include <cstdint>

namespace steadygrad::sanitize {

// The number of teams of threads that have run so far.
int64_t team_count();

}  // namespace steadygrad::sanitize
