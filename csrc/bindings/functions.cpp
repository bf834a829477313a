#include "bindings/functions.h"

#include <cmath>

#include "bindings/tensor.h"
#include "cpu/operations.h"

namespace steadygrad::bindings {
namespace {

// Pointers seen so far: a tensor that appears twice in a list counts once.
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
  cpu::Tensors tensors;
  bool any_float64 = false;
};

GradList grads_of(const py::list& grads, const char* function, const char* name, Use use,
                  bool complex_allowed) {
  GradList list;
  const Py_ssize_t count = PyList_GET_SIZE(grads.ptr());
  list.tensors.reserve(count);
  Seen seen(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const object = PyList_GET_ITEM(grads.ptr(), i);
    if (!seen.insert(object)) continue;
    const Argument argument{function, name, i};
    const View view = view_of(object, argument);
    if (view.is_complex && !complex_allowed) throw_type_error(argument, "a real tensor", object);
    if (use == Use::write) check_writable(view, argument);
    list.tensors.push_back(operands_of(view, &TensorOperands::grad));
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

// (norm, number of non-finite elements, whether the norm is a float64 one)
py::tuple norm_result(const Norm& norm, const GradList& list) {
  return py::make_tuple(norm.norm, norm.nonfinite, list.any_float64);
}

py::tuple grad_norm(const py::list& tensors, double p) {
  adopt_torch_threads();
  constexpr const char* kName = "get_total_norm";
  const NormType type = checked_norm_type(kName, p);
  const GradList list = grads_of(tensors, kName, "tensors", Use::read, type.kind == NormKind::two);
  Norm norm;
  {
    const py::gil_scoped_release release;
    norm = cpu::grad_norm(list.tensors, type);
  }
  return norm_result(norm, list);
}

// Returns norm_result. With error_if_nonfinite a non-finite norm leaves them alone.
py::tuple clip_grad_norm(const py::list& grads, double max_norm, double p, bool error_if_nonfinite) {
  adopt_torch_threads();
  constexpr const char* kName = "clip_grad_norm_";
  check_not_negative(kName, "max_norm", max_norm);
  const NormType type = checked_norm_type(kName, p);
  const GradList list = grads_of(grads, kName, "parameters.grad", Use::write, type.kind == NormKind::two);
  const cpu::ChunkTable table(list.tensors);
  Norm norm;
  {
    const py::gil_scoped_release release;
    norm = cpu::GradNorms(list.tensors, table, {TransformOptions{}}, type).total();
  }
  TransformOptions options;
  options.clip_coefficient = clip_coefficient(max_norm, norm.norm);
  if (options.clip_coefficient != 1 && !(error_if_nonfinite && norm.nonfinite > 0)) {
    announce_write(grads);
    const py::gil_scoped_release release;
    cpu::transform_grads(list.tensors, table, [&](int32_t) { return options; });
  }
  return norm_result(norm, list);
}

void transform_all(const GradList& list, const TransformOptions& options) {
  const py::gil_scoped_release release;
  cpu::transform_grads(list.tensors, cpu::ChunkTable(list.tensors), [&](int32_t) { return options; });
}

void clip_grads_with_norm(const py::list& grads, double max_norm, double total_norm) {
  adopt_torch_threads();
  constexpr const char* kName = "clip_grads_with_norm_";
  check_not_negative(kName, "max_norm", max_norm);
  const GradList list = grads_of(grads, kName, "parameters.grad", Use::write, true);
  TransformOptions options;
  options.clip_coefficient = clip_coefficient(max_norm, total_norm);
  if (options.clip_coefficient == 1) return;
  announce_write(grads);
  transform_all(list, options);
}

void clip_grad_value(const py::list& grads, double clip_value) {
  adopt_torch_threads();
  constexpr const char* kName = "clip_grad_value_";
  check_not_negative(kName, "clip_value", clip_value);
  const GradList list = grads_of(grads, kName, "parameters.grad", Use::write, false);
  TransformOptions options;
  options.clip_value = clip_value;
  announce_write(grads);
  transform_all(list, options);
}

double add_penalty(const py::list& params, const py::list& grads, double l1, double l2) {
  adopt_torch_threads();
  constexpr const char* kName = "add_penalty_";
  check_not_negative(kName, "l1", l1);
  check_not_negative(kName, "l2", l2);
  const Py_ssize_t count = PyList_GET_SIZE(params.ptr());
  cpu::Tensors tensors;
  tensors.reserve(count);
  Seen seen(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const param = PyList_GET_ITEM(params.ptr(), i);
    PyObject* const grad = PyList_GET_ITEM(grads.ptr(), i);
    if (!seen.insert(param)) continue;
    const Argument argument{kName, "params", i};
    const Argument grad_argument{kName, "params", i, ".grad"};
    const View views[] = {view_of(param, argument), view_of(grad, grad_argument)};
    if (views[0].is_complex || views[1].is_complex) throw_type_error(argument, "a real tensor", param);
    if (!same_sizes(views[0], views[1])) throw_type_error(grad_argument, "the parameter's shape", grad);
    check_writable(views[1], grad_argument);
    check_not_negated(views[1], grad, grad_argument);
    TensorOperands& tensor = tensors.emplace_back();
    Operand* const operands[] = {&tensor.param, &tensor.grad};
    set_operands(tensor, views, operands, 2);
  }
  if (l1 != 0 || l2 != 0) announce_write(grads);
  const py::gil_scoped_release release;
  return cpu::add_penalty(tensors, l1, l2);
}

void soft_threshold(const py::list& params, double amount) {
  adopt_torch_threads();
  constexpr const char* kName = "soft_threshold_";
  check_not_negative(kName, "amount", amount);
  const Py_ssize_t count = PyList_GET_SIZE(params.ptr());
  cpu::Tensors tensors;
  tensors.reserve(count);
  Seen seen(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const param = PyList_GET_ITEM(params.ptr(), i);
    if (!seen.insert(param)) continue;
    const Argument argument{kName, "params", i};
    const View view = view_of(param, argument);
    if (view.is_complex) throw_type_error(argument, "a real tensor", param);
    check_writable(view, argument);
    tensors.push_back(operands_of(view, &TensorOperands::param));
  }
  if (amount == 0) return;
  announce_write(params);
  const py::gil_scoped_release release;
  cpu::soft_threshold(tensors, amount);
}

}  // namespace

void define_functions(py::module_& module) {
  module.def("grad_norm", &grad_norm, py::arg("tensors"), py::arg("norm_type"));
  module.def("clip_grad_norm_", &clip_grad_norm, py::arg("grads"), py::arg("max_norm"), py::arg("norm_type"),
             py::arg("error_if_nonfinite"));
  module.def("clip_grads_with_norm_", &clip_grads_with_norm, py::arg("grads"), py::arg("max_norm"),
             py::arg("total_norm"));
  module.def("clip_grad_value_", &clip_grad_value, py::arg("grads"), py::arg("clip_value"));
  module.def("add_penalty_", &add_penalty, py::arg("params"), py::arg("grads"), py::arg("l1"), py::arg("l2"));
  module.def("soft_threshold_", &soft_threshold, py::arg("params"), py::arg("amount"));
}

}  // namespace steadygrad::bindings
