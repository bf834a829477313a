// Binds the operations on lists of tensors.
#pragma once

#include <pybind11/pybind11.h>

namespace steadygrad::bindings {

void define_functions(pybind11::module_& module);

}  // namespace steadygrad::bindings
