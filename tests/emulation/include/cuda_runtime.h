// Stands in for the CUDA toolkit's header of this name when a .cu file is compiled for emulation.
#pragma once

#if defined(__CUDACC__)
#error "tests/emulation/include is for C++ compilers; nvcc has its own cuda_runtime.h"
#endif

#include "emulation/atomic_functions.h"
#include "emulation/launch.h"
#include "emulation/math_functions.h"
#include "emulation/memory_functions.h"
#include "emulation/qualifiers.h"
#include "emulation/runtime.h"
#include "emulation/synchronization.h"
#include "emulation/vector_types.h"
#include "emulation/warp_functions.h"
