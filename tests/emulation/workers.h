// The OS threads that run blocks. They are started when first needed, kept, and never joined: they sleep
// between launches and keep no process from ending.
#pragma once

#include "emulation/grid.h"

namespace steadygrad::emulation {

// Runs all blocks of the grid, none of them on the calling thread, whose thread-local variables may belong to
// others. Only one grid runs at a time; callers wait for each other. Returns false if the system has too few
// threads, or if the caller is itself a block.
bool run_grid(Grid& grid);

}  // namespace steadygrad::emulation
