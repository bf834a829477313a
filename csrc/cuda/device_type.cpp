#include <dlpack/dlpack.h>

#include "cuda/operations.h"

namespace steadygrad::cuda {

int device_type() { return kDLCUDA; }

}  // namespace steadygrad::cuda
