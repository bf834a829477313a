#include "cuda/update.h"

namespace steadygrad::cuda {

void update_adagrad(const char* function, const UpdateArguments& arguments, Stream stream) {
  launch_update<RuleKind::adagrad>(function, arguments, stream);
}

}  // namespace steadygrad::cuda
