#include "cuda/step/update_kernel.h"

namespace steadygrad::cuda {

template void launch_update<AdamRule>(const char* function, const UpdateArguments& arguments, Stream stream);

}  // namespace steadygrad::cuda
