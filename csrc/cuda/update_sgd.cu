#include "cuda/update.h"

namespace steadygrad::cuda {

void update_sgd(const char* function, const UpdateArguments& arguments, Stream stream) {
  launch_update<RuleKind::sgd>(function, arguments, stream);
}

}  // namespace steadygrad::cuda
