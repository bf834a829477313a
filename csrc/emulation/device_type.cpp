// The emulated backend takes tensors on the CPU.
#include <dlpack/dlpack.h>

#include "cuda/operations.h"

namespace steadygrad::cuda {

int device_type() { return kDLCPU; }

}  // namespace steadygrad::cuda
