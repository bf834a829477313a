#include "cuda/operations.h"

namespace steadygrad::cuda {

Devices devices() { return Devices::cuda; }

}  // namespace steadygrad::cuda
