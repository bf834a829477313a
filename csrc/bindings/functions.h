// The operations that work on lists of tensors, one binding each.
#pragma once

#include <pybind11/pybind11.h>

namespace steadygrad::bindings {

void define_functions(pybind11::module_& module);

}  // namespace steadygrad::bindings
