// Fills shared memory with 0xff (NaN, -1) before each block, so that a kernel that reads what it has not
// written gives wrong results.
#pragma once

#include <cstddef>

namespace steadygrad::emulation {

// Every `__shared__` variable of this module, as the calling OS thread sees it.
void poison_shared_variables();

void poison(void* memory, size_t bytes);

}  // namespace steadygrad::emulation
