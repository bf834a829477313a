// The extension module steadygrad._kernels. For tests it is also built as _emulated, with CUDA kernels on the
// CPU.
#include <pybind11/pybind11.h>

#include "bindings/batch_norm.h"
#include "bindings/functions.h"
#include "bindings/param_groups.h"
#include "bindings/plan.h"
#include "bindings/tensor.h"
#include "cpu/parallel.h"
#include "cpu/vector_kernels.h"

namespace py = pybind11;
using namespace steadygrad;

namespace {

const Backend* linked(const Backend& (*backend)()) { return backend == nullptr ? nullptr : &backend(); }

// The build says for each module what is linked in, cuda_backend or nullptr, and which of DLPack's devices it
// is for: the CPU, where the kernels are emulated.
const Backend* cuda() { return linked(STEADYGRAD_CUDA_BACKEND); }

py::dict cuda_info() {
  const BackendInfo backend = cuda() != nullptr ? cuda()->info() : BackendInfo();
  py::dict info;
  info["compiled"] = backend.compiled;
  info["architectures"] = backend.architectures;
  info["runtime_version"] = backend.runtime_version;
  info["driver_version"] = backend.driver_version;
  info["problem"] = backend.problem;
  py::list devices;
  for (const DeviceInfo& device : backend.devices) {
    py::dict entry;
    entry["name"] = device.name;
    entry["major"] = device.major;
    entry["minor"] = device.minor;
    entry["usable"] = device.usable;
    devices.append(entry);
  }
  info["devices"] = devices;
  return info;
}

py::dict build_info() {
  py::dict info;
  info["version"] = STEADYGRAD_VERSION;
  info["compiler"] = STEADYGRAD_COMPILER;
  py::list backends;
  backends.append("cpu");
  if (cuda() != nullptr) backends.append("cuda");
  info["cuda"] = cuda_info();
  info["backends"] = backends;
  info["instruction_set"] = cpu::instruction_set();
  info["openmp_library"] = cpu::openmp_library();
  info["max_threads"] = cpu::max_threads();
  info["dlpack_version"] = py::make_tuple(DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION);
  info["exchange_api_version"] = bindings::exchange_api_version();
  return info;
}

}  // namespace

PYBIND11_MODULE(STEADYGRAD_MODULE, module) {
  bindings::import_torch();
  if (cuda() != nullptr) bindings::add_backend(STEADYGRAD_CUDA_DEVICES, *cuda());
  cpu::instruction_set();  // raises at import if the environment names an unknown instruction set
  module.attr("VERSION") = STEADYGRAD_VERSION;
  module.def("build_info", &build_info);
  module.def("launch_count", [] { return cuda() != nullptr ? cuda()->launch_count() : 0; });
  bindings::define_batch_norm(module);
  bindings::define_plan_options(module);
  bindings::define_functions(module);
  bindings::define_param_groups(module);
  bindings::define_plan(module);
}
