// The extension module steadygrad._kernels.
#include <pybind11/pybind11.h>

#include "bindings/functions.h"
#include "bindings/plan.h"
#include "bindings/tensor.h"
#include "cpu/parallel.h"
#include "cpu/vector_kernels.h"

namespace py = pybind11;
using namespace steadygrad;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = STEADYGRAD_VERSION;
  info["compiler"] = STEADYGRAD_COMPILER;
  py::list backends;
  backends.append("cpu");
  info["backends"] = backends;
  info["instruction_set"] = cpu::instruction_set();
  info["openmp_library"] = cpu::openmp_library();
  info["max_threads"] = cpu::max_threads();
  info["dlpack_version"] = py::make_tuple(DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION);
  info["exchange_api_version"] = bindings::exchange_api_version();
  return info;
}

}  // namespace

PYBIND11_MODULE(_kernels, module) {
  bindings::import_torch();
  cpu::instruction_set();  // an unknown name in the environment is told at import
  module.def("build_info", &build_info);
  bindings::define_functions(module);
  bindings::define_plan(module);
}
