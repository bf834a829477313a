// What the program asks of its OpenMP runtime.
#pragma once

#include <cstdint>

namespace steadygrad::sanitize {

// Teams of threads that have run so far.
int64_t team_count();

}  // namespace steadygrad::sanitize
