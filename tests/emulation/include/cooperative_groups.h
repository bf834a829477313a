// Stands in for the CUDA toolkit's header of this name when a .cu file is compiled for emulation.
#pragma once

#include <cuda_runtime.h>

#include "emulation/groups.h"
