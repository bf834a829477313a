#include "bindings/functions.h"

#include <cmath>

#include "bindings/signature.h"
#include "bindings/tensor.h"

namespace steadygrad::bindings {
namespace {

// The set of pointers seen so far, since a tensor that appears twice in a list counts once.
class Seen {
 public:
  explicit Seen(size_t count) : slots_(capacity(count), nullptr) {}

  bool insert(const void* pointer) {
    const size_t mask = slots_.size() - 1;
    size_t slot = (reinterpret_cast<uintptr_t>(pointer) >> 4) * 0x9e3779b97f4a7c15u >> 20 & mask;
    while (slots_[slot] != nullptr) {
      if (slots_[slot] == pointer) return false;
      slot = (slot + 1) & mask;
    }
    slots_[slot] = pointer;
    return true;
  }

 private:
  static size_t capacity(size_t count) {
    size_t size = 16;
    while (size < 2 * count) size *= 2;
    return size;
  }
  std::vector<const void*> slots_;
};

enum class Use { read, write };

struct GradList {
  std::vector<TensorOperands> tensors;
  Device device;
  bool any_float64 = false;
};

// `calls_python` says whether Python will run between this look at the tensors and their use.
GradList grads_of(const py::list& grads, const char* function, const char* name, Use use,
                  bool complex_allowed, bool calls_python = false) {
  GradList list;
  list.device.calls_python = calls_python;
  const Py_ssize_t count = PyList_GET_SIZE(grads.ptr());
  list.tensors.reserve(count);
  Seen seen(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const object = PyList_GET_ITEM(grads.ptr(), i);
    if (!seen.insert(object)) continue;
    const Argument argument{function, name, i};
    const View view = view_of(object, argument, list.device);
    if (view.is_complex && !complex_allowed) throw_type_error(argument, "a real tensor", object);
    if (use == Use::write) check_writable(view, argument);
    list.tensors.push_back(operands_of(view, &TensorOperands::grad));
    list.tensors.back().place = static_cast<int32_t>(list.tensors.size()) - 1;
    if (view.is_complex && list.tensors.back().grad.strides != nullptr) {
      throw_type_error(argument, "a complex tensor that fills its memory (contiguous() makes one)", object);
    }
    list.any_float64 = list.any_float64 || view.dtype == DType::float64;
  }
  return list;
}

void check_not_negative(const char* function, const char* name, double value) {
  if (!(value >= 0)) {
    throw py::value_error(std::string(function) + ": " + name + ": expected a number >= 0, got " +
                          std::string(py::str(py::float_(value))));
  }
}

NormType checked_norm_type(const char* function, double p) {
  if (std::isnan(p)) {
    throw py::value_error(std::string(function) + ": norm_type: expected a number, got nan");
  }
  return norm_type(p);
}

// Returns (norm, number of non-finite elements, whether the norm is float64).
py::tuple norm_result(const Outcome& outcome, const GradList& list) {
  return py::make_tuple(outcome.norm, outcome.nonfinite, list.any_float64);
}

// `output` holds the tensors that an asynchronous backend writes to; the CPU backend writes to `outcome`.
NormOutput norm_output(const char* function, const py::object& output, Device& device, Outcome& outcome) {
  if (!device.backend->is_asynchronous) return {&outcome};
  const py::tuple tensors = output;
  constexpr int64_t kDoubles = sizeof(Outcome) / sizeof(double);
  const Argument argument{function, "output", -1};
  return {memory_of<Outcome>(tensors[0], argument, {kDLFloat, 64, 1}, kDoubles, device),
          memory_of<float>(tensors[1], argument, {kDLFloat, 32, 1}, 1, device),
          memory_of<double>(tensors[2], argument, {kDLFloat, 64, 1}, 1, device)};
}

// A function has a single scope, and every tensor of the list is a slot.
Reduction reduction_for(const char* function, const ReductionMemory* reduction, GradList& list) {
  return reduction_of(function, reduction, 1, list.tensors.size(), false, list.device);
}

// `reduction` is that of reduction_of(); it runs even if this process has no tensors.
py::tuple grad_norm(const py::list& tensors, double p, const py::object& output, const py::object& allocate,
                    const ReductionMemory* reduction) {
  constexpr const char* kName = "get_total_norm";
  const NormType type = checked_norm_type(kName, p);
  GradList list =
      grads_of(tensors, kName, "tensors", Use::read, type.kind == NormKind::two, reduction != nullptr);
  const Reduction all = reduction_for(kName, reduction, list);
  Outcome outcome;
  const NormOutput to = norm_output(kName, output, list.device, outcome);
  run(&Backend::grad_norm, list.device, allocate, list.tensors, type, to, all);
  return norm_result(outcome, list);
}

// With error_if_nonfinite, a non-finite norm leaves the gradients unchanged.
py::tuple clip_grad_norm(const py::list& grads, double max_norm, double p, bool error_if_nonfinite,
                         const py::object& output, const py::object& allocate,
                         const ReductionMemory* reduction) {
  constexpr const char* kName = "clip_grad_norm_";
  check_not_negative(kName, "max_norm", max_norm);
  const NormType type = checked_norm_type(kName, p);
  GradList list =
      grads_of(grads, kName, "parameters.grad", Use::write, type.kind == NormKind::two, reduction != nullptr);
  const Reduction all = reduction_for(kName, reduction, list);
  Outcome outcome;
  const NormOutput to = norm_output(kName, output, list.device, outcome);
  const auto announce = [&](bool) {
    const py::gil_scoped_acquire acquire;
    announce_write(grads);
  };
  run(&Backend::clip_grad_norm, list.device, allocate, list.tensors, max_norm, type, error_if_nonfinite, to,
      all, announce);
  return norm_result(outcome, list);
}

// `total_norm` is a number, or a tensor on the device of the gradients, which is not waited for.
void clip_grads_with_norm(const py::list& grads, double max_norm, const py::object& total_norm,
                          const py::object& allocate) {
  constexpr const char* kName = "clip_grads_with_norm_";
  check_not_negative(kName, "max_norm", max_norm);
  GradList list = grads_of(grads, kName, "parameters.grad", Use::write, true);
  if (!py::isinstance<py::float_>(total_norm)) {
    if (list.tensors.empty()) return;
    const Number norm = number_on(total_norm.ptr(), {kName, "total_norm", -1}, list.device);
    if (max_norm == INFINITY) return;
    announce_write(grads);
    return run(&Backend::clip_grads_with_norm, list.device, allocate, list.tensors, max_norm, norm);
  }
  TransformOptions options;
  options.clip_coefficient = clip_coefficient(max_norm, total_norm.cast<double>());
  if (options.clip_coefficient == 1) return;
  announce_write(grads);
  run(&Backend::transform_grads, list.device, allocate, list.tensors, options);
}

void clip_grad_value(const py::list& grads, double clip_value, const py::object& allocate) {
  constexpr const char* kName = "clip_grad_value_";
  check_not_negative(kName, "clip_value", clip_value);
  GradList list = grads_of(grads, kName, "parameters.grad", Use::write, false);
  TransformOptions options;
  options.clip_value = clip_value;
  announce_write(grads);
  run(&Backend::transform_grads, list.device, allocate, list.tensors, options);
}

// Returns the penalty's value, or writes it to the float64 tensor `value` if the backend is asynchronous.
double add_penalty(const py::list& params, const py::list& grads, double l1, double l2,
                   const py::object& value, const py::object& allocate) {
  constexpr const char* kName = "add_penalty_";
  check_not_negative(kName, "l1", l1);
  check_not_negative(kName, "l2", l2);
  const Py_ssize_t count = PyList_GET_SIZE(params.ptr());
  if (PyList_GET_SIZE(grads.ptr()) != count) {
    throw py::value_error(std::string(kName) + ": grads: expected one per parameter, " +
                          std::to_string(count) + ", got " + std::to_string(PyList_GET_SIZE(grads.ptr())));
  }
  std::vector<TensorOperands> tensors;
  std::vector<py::object> read;  // the parameters, or a copy of those that torch has negated lazily
  Device device;
  tensors.reserve(count);
  read.reserve(count);
  Seen seen(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const param = PyList_GET_ITEM(params.ptr(), i);
    PyObject* const grad = PyList_GET_ITEM(grads.ptr(), i);
    if (!seen.insert(param)) continue;
    const Argument argument{kName, "params", i};
    const Argument grad_argument{kName, "params", i, ".grad"};
    read.push_back(resolved(param));
    const View views[] = {view_of(read.back().ptr(), argument, device), view_of(grad, grad_argument, device)};
    if (views[0].is_complex || views[1].is_complex) throw_type_error(argument, "a real tensor", param);
    if (!same_sizes(views[0], views[1])) throw_type_error(grad_argument, "the parameter's shape", grad);
    check_writable(views[1], grad_argument);
    check_not_negated(grad, grad_argument);
    TensorOperands& tensor = tensors.emplace_back();
    Operand* const operands[] = {&tensor.param, &tensor.grad};
    set_operands(tensor, views, operands, 2);
  }
  if (l1 != 0 || l2 != 0) announce_write(grads);
  double on_host = 0;
  double* to = &on_host;
  if (device.backend->is_asynchronous) {
    to = memory_of<double>(value, {kName, "value", -1}, {kDLFloat, 64, 1}, 1, device);
  }
  run(&Backend::add_penalty, device, allocate, tensors, l1, l2, to);
  return on_host;
}

void soft_threshold(const py::list& params, double amount, const py::object& allocate) {
  constexpr const char* kName = "soft_threshold_";
  check_not_negative(kName, "amount", amount);
  const Py_ssize_t count = PyList_GET_SIZE(params.ptr());
  std::vector<TensorOperands> tensors;
  Device device;
  tensors.reserve(count);
  Seen seen(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const param = PyList_GET_ITEM(params.ptr(), i);
    if (!seen.insert(param)) continue;
    const Argument argument{kName, "params", i};
    const View view = view_of(param, argument, device);
    if (view.is_complex) throw_type_error(argument, "a real tensor", param);
    check_writable(view, argument);
    tensors.push_back(operands_of(view, &TensorOperands::param));
  }
  if (amount == 0) return;
  announce_write(params);
  run(&Backend::soft_threshold, device, allocate, tensors, amount);
}

}  // namespace

void define_functions(py::module_& module) {
  define(module, "grad_norm", &grad_norm, py::arg("tensors"), py::arg("norm_type"), py::arg("output"),
         py::arg("allocate"), py::arg("reduction") = py::none());
  define(module, "clip_grad_norm_", &clip_grad_norm, py::arg("grads"), py::arg("max_norm"),
         py::arg("norm_type"), py::arg("error_if_nonfinite"), py::arg("output"), py::arg("allocate"),
         py::arg("reduction") = py::none());
  define(module, "clip_grads_with_norm_", &clip_grads_with_norm, py::arg("grads"), py::arg("max_norm"),
         py::arg("total_norm"), py::arg("allocate"));
  define(module, "clip_grad_value_", &clip_grad_value, py::arg("grads"), py::arg("clip_value"),
         py::arg("allocate"));
  define(module, "add_penalty_", &add_penalty, py::arg("params"), py::arg("grads"), py::arg("l1"),
         py::arg("l2"), py::arg("value"), py::arg("allocate"));
  define(module, "soft_threshold_", &soft_threshold, py::arg("params"), py::arg("amount"),
         py::arg("allocate"));
  define(
      module, "is_asynchronous",
      [](const std::string& device_type) {
        const int type = device_type == "cpu" ? kDLCPU : device_type == "cuda" ? kDLCUDA : 0;
        const Backend* const backend = backend_for(type);
        return backend != nullptr && backend->is_asynchronous;
      },
      py::arg("device_type"));
}

}  // namespace steadygrad::bindings
