// Binds batch_norm_*, the operations of batch normalization; see python/steadygrad/_kernels.pyi.
#pragma once

#include <pybind11/pybind11.h>

namespace steadygrad::bindings {

void define_batch_norm(pybind11::module_& module);

}  // namespace steadygrad::bindings
