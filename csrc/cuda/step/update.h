// Pass 2 of a step: the update rule on every element.
#pragma once

#include "core/rules/table.h"
#include "cuda/gradient.h"
#include "cuda/tensor_table.h"
#include "cuda/unit_clip.h"

namespace steadygrad::cuda {

struct UpdateArguments {
  TensorTable table;
  void* const* grads;
  TransformSource source;
  const StepScalars* scalars;
  int32_t* taken;
  bool gradients_are_final;  // pass 2 of the gradients has written them
};

// Every rule has a file of its own, update_NAME.cu, so that they compile side by side.
template <class Rule>
void launch_update(const char* function, const UpdateArguments& arguments, Stream stream);

}  // namespace steadygrad::cuda
