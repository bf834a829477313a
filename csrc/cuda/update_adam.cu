#include "cuda/update.h"

namespace steadygrad::cuda {

void update_adam(const char* function, const UpdateArguments& arguments, Stream stream) {
  launch_update<RuleKind::adam>(function, arguments, stream);
}

}  // namespace steadygrad::cuda
