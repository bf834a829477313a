#include "cuda/update.h"

namespace steadygrad::cuda {

void update_rmsprop(const char* function, const UpdateArguments& arguments, Stream stream) {
  launch_update<RuleKind::rmsprop>(function, arguments, stream);
}

}  // namespace steadygrad::cuda
