#include "bindings/batch_norm.h"

#include <cmath>

#include "bindings/signature.h"
#include "bindings/tensor.h"
#include "core/batch_norm.h"

namespace steadygrad::bindings {
namespace {

constexpr const char* kName = "batch_norm";
constexpr DLDataType kFloat64{kDLFloat, 64, 1};
constexpr DLDataType kInt64{kDLInt, 64, 1};
constexpr DLDataType kUInt8{kDLUInt, 8, 1};

enum class Layout { other = 0, channels_first = 1, channels_last = 2 };

Layout layout_of(const View& view) {
  if (view.ndim < 2) return Layout::other;
  if (is_contiguous(view)) return Layout::channels_first;
  int64_t expected = 1;
  const auto lies = [&](int d) {
    const bool right = view.sizes[d] == 1 || view.strides[d] == expected;
    expected *= view.sizes[d];
    return right;
  };
  bool last = lies(1);
  for (int d = view.ndim - 1; d >= 2; --d) last = lies(d) && last;
  last = lies(0) && last;
  return last ? Layout::channels_last : Layout::other;
}

View real_view(PyObject* object, const char* name, Device& device) {
  const Argument argument{kName, name, -1};
  const View view = view_of(object, argument, device);
  if (view.is_complex) throw_type_error(argument, "a real tensor", object);
  check_not_negated(object, argument);
  return view;
}

ChannelVector channel_vector(const py::object& tensor, const char* name, int64_t channels, Device& device) {
  if (tensor.is_none()) return {};
  const View view = real_view(tensor.ptr(), name, device);
  if (view.ndim != 1 || view.numel != channels || !is_contiguous(view)) {
    throw_type_error({kName, name, -1}, "a contiguous vector of " + std::to_string(channels) + " elements",
                     tensor.ptr());
  }
  return {view.data, view.dtype};
}

double number(const py::object& object, const char* name) {
  const double value = PyFloat_AsDouble(object.ptr());
  if (value == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    throw_type_error({kName, name, -1}, "a number or None", object.ptr());
  }
  return value;
}

// Returns the ceiling as BatchNorm has it, where NaN stands for None.
double ceiling_or_nan(const py::object& ceiling) {
  if (ceiling.is_none()) return NAN;
  const double value = number(ceiling, "ceiling");
  if (value > 0) return value;
  throw py::value_error("batch_norm: ceiling: expected a positive number or None, got " +
                        py::str(ceiling).cast<std::string>());
}

// Holds one call's arguments: the input, and everything else after a check against the input.
class Call {
 public:
  Call(const py::object& input, const py::object& weight, const py::object& bias, double eps,
       const py::object& ceiling)
      : input_(real_view(input.ptr(), "input", device)) {
    const Layout layout = layout_of(input_);
    if (layout == Layout::other) {
      throw_type_error({kName, "input", -1},
                       "a tensor of 2 dimensions or more, contiguous or with channels last", input.ptr());
    }
    BatchNormShape& shape = norm.shape;
    shape.channels = input_.sizes[1];
    shape.outer = input_.sizes[0];
    for (int d = 2; d < input_.ndim; ++d) shape.inner *= input_.sizes[d];
    if (layout == Layout::channels_last) {
      shape.outer *= shape.inner;
      shape.inner = 1;
    }
    norm.dtype = input_.dtype;
    norm.input = input_.data;
    norm.weight = channels(weight, "weight");
    norm.bias = channels(bias, "bias");
    norm.eps = eps;
    norm.ceiling = ceiling_or_nan(ceiling);
  }

  // Returns the elements of a tensor with the input's shape, dtype and strides.
  void* like_input(const py::object& tensor, const char* name) {
    const View view = real_view(tensor.ptr(), name, device);
    const Argument argument{kName, name, -1};
    if (!same_sizes(view, input_)) throw_type_error(argument, "the input's shape", tensor.ptr());
    if (view.dtype != input_.dtype) throw_type_error(argument, "the input's dtype", tensor.ptr());
    if (!same_strides(view, input_)) throw_type_error(argument, "the input's strides", tensor.ptr());
    return view.data;
  }

  void* like_input_or_none(const py::object& tensor, const char* name) {
    return tensor.is_none() ? nullptr : like_input(tensor, name);
  }

  ChannelVector channels(const py::object& tensor, const char* name) {
    return channel_vector(tensor, name, norm.shape.channels, device);
  }

  double* float64(const py::object& tensor, const char* name, int64_t numel) {
    return static_cast<double*>(vector_of(tensor.ptr(), {kName, name, -1}, kFloat64, numel, device));
  }

  double* statistics(const py::object& tensor) {
    return float64(tensor, "statistics", statistics_size(norm.shape.channels));
  }

  // Takes mean and variance from the vector of statistics, or from the running statistics. Returns whether it
  // was the vector.
  bool normalize_with(const py::object& tensor, const py::object& running_mean,
                      const py::object& running_var) {
    if (tensor.is_none()) {
      norm.mean = channels(running_mean, "running_mean");
      norm.var = channels(running_var, "running_var");
      if (norm.mean.data == nullptr || norm.var.data == nullptr) {
        throw_type_error({kName, "statistics", -1}, "a tensor, or running_mean and running_var",
                         tensor.ptr());
      }
      return false;
    }
    double* const vector = statistics(tensor);
    norm.mean = {vector, DType::float64};
    norm.var = {vector + norm.shape.channels, DType::float64};
    return true;
  }

  uint8_t* mask(const py::object& tensor) {
    if (tensor.is_none()) return nullptr;
    const int64_t bytes = norm.shape.mask_rows() * norm.shape.mask_row_bytes();
    return static_cast<uint8_t*>(vector_of(tensor.ptr(), {kName, "mask", -1}, kUInt8, bytes, device));
  }

  Device device;
  BatchNorm norm;

 private:
  View input_;
};

// Holds the running statistics, and the tensors among them that will be written.
class Running {
 public:
  Running(const py::object& mean, const py::object& var, const py::object& num_batches_tracked,
          const py::object& momentum, int64_t channels, Device& device) {
    statistics.mean = vector(mean, "running_mean", channels, device);
    statistics.var = vector(var, "running_var", channels, device);
    if (!num_batches_tracked.is_none()) {
      written_.append(num_batches_tracked);
      statistics.num_batches_tracked = static_cast<int64_t*>(
          vector_of(num_batches_tracked.ptr(), {kName, "num_batches_tracked", -1}, kInt64, 1, device));
    }
    statistics.cumulative = momentum.is_none();
    if (!statistics.cumulative) statistics.momentum = number(momentum, "momentum");
    if (statistics.cumulative && statistics.mean.data != nullptr &&
        statistics.num_batches_tracked == nullptr) {
      throw py::value_error("batch_norm: momentum: expected a number where no batches are counted, got None");
    }
  }

  void announce() const {
    if (PyList_GET_SIZE(written_.ptr()) > 0) announce_write(written_);
  }

  RunningStatistics statistics;

 private:
  ChannelVector vector(const py::object& tensor, const char* name, int64_t channels, Device& device) {
    if (!tensor.is_none()) written_.append(tensor);
    return channel_vector(tensor, name, channels, device);
  }

  py::list written_;
};

int batch_norm_layout(const py::object& input) {
  Device device;
  return static_cast<int>(layout_of(view_of(input.ptr(), {kName, "input", -1}, device)));
}

void batch_norm_statistics(const py::object& input, const py::object& statistics,
                           const py::object& allocate) {
  Call call(input, py::none(), py::none(), 0, py::none());
  double* const to = call.statistics(statistics);
  run(&Backend::batch_norm_statistics, call.device, allocate, call.norm, to);
}

void batch_norm_forward(const py::object& input, const py::object& residual, const py::object& weight,
                        const py::object& bias, const py::object& running_mean, const py::object& running_var,
                        const py::object& num_batches_tracked, const py::object& momentum, double eps,
                        const py::object& ceiling, const py::object& output, const py::object& mask,
                        const py::object& statistics, const py::object& allocate) {
  Call call(input, weight, bias, eps, ceiling);
  const BatchNormOutput out{call.like_input_or_none(residual, "residual"), call.like_input(output, "output"),
                            call.mask(mask)};
  double* const to = call.statistics(statistics);
  const Running running(running_mean, running_var, num_batches_tracked, momentum, call.norm.shape.channels,
                        call.device);
  running.announce();
  run(&Backend::batch_norm_forward, call.device, allocate, call.norm, out, to, running.statistics);
}

void batch_norm_normalize(const py::object& input, const py::object& residual, const py::object& weight,
                          const py::object& bias, const py::object& statistics,
                          const py::object& running_mean, const py::object& running_var, double eps,
                          const py::object& ceiling, const py::object& output, const py::object& mask) {
  Call call(input, weight, bias, eps, ceiling);
  call.normalize_with(statistics, running_mean, running_var);
  const BatchNormOutput out{call.like_input_or_none(residual, "residual"), call.like_input(output, "output"),
                            call.mask(mask)};
  run(&Backend::batch_norm_normalize, call.device, py::none(), call.norm, out);
}

void batch_norm_combine(const py::object& parts, const py::object& statistics, const py::object& running_mean,
                        const py::object& running_var, const py::object& num_batches_tracked,
                        const py::object& momentum) {
  Device device;
  const Argument argument{kName, "parts", -1};
  const View view = view_of(parts.ptr(), argument, device);
  if (view.ndim != 2 || view.dtype != DType::float64 || view.is_complex || view.sizes[1] % 2 != 1 ||
      !is_contiguous(view)) {
    throw_type_error(argument, "a contiguous float64 tensor of shape (parts, 2 * channels + 1)", parts.ptr());
  }
  check_not_negated(parts.ptr(), argument);
  const int64_t channels = view.sizes[1] / 2;
  auto* const from = static_cast<const double*>(view.data);
  auto* const to = static_cast<double*>(
      vector_of(statistics.ptr(), {kName, "statistics", -1}, kFloat64, statistics_size(channels), device));
  const Running running(running_mean, running_var, num_batches_tracked, momentum, channels, device);
  running.announce();
  run(&Backend::batch_norm_combine, device, py::none(), from, view.sizes[0], channels, to,
      running.statistics);
}

// Refuses a gradient that needs ReLU's mask if the mask is missing.
void check_mask(const BatchNorm& norm, const BatchNormGradient& grad) {
  if (norm.has_relu() && grad.grad_residual != nullptr && grad.mask == nullptr) {
    throw py::type_error(
        "batch_norm: mask: expected the mask of the forward call, since ReLU follows a residual, got None");
  }
}

void batch_norm_backward(const py::object& grad_output, const py::object& input, const py::object& mask,
                         const py::object& weight, const py::object& bias, const py::object& statistics,
                         const py::object& running_mean, const py::object& running_var, double eps,
                         const py::object& ceiling, const py::object& grad_input,
                         const py::object& grad_residual, const py::object& grad_weight,
                         const py::object& grad_bias, const py::object& allocate) {
  Call call(input, weight, bias, eps, ceiling);
  const bool constant_statistics = !call.normalize_with(statistics, running_mean, running_var);
  const BatchNormGradient grad{call.like_input(grad_output, "grad_output"),
                               call.mask(mask),
                               call.like_input_or_none(grad_input, "grad_input"),
                               call.like_input_or_none(grad_residual, "grad_residual"),
                               call.channels(grad_weight, "grad_weight"),
                               call.channels(grad_bias, "grad_bias")};
  check_mask(call.norm, grad);
  run(&Backend::batch_norm_backward, call.device, allocate, call.norm, grad, constant_statistics);
}

void batch_norm_backward_sums(const py::object& grad_output, const py::object& input, const py::object& mask,
                              const py::object& weight, const py::object& bias, const py::object& statistics,
                              double eps, const py::object& ceiling, const py::object& sums,
                              const py::object& allocate) {
  Call call(input, weight, bias, eps, ceiling);
  call.normalize_with(statistics, py::none(), py::none());
  BatchNormGradient grad;
  grad.grad_output = call.like_input(grad_output, "grad_output");
  grad.mask = call.mask(mask);
  double* const to = call.float64(sums, "sums", 2 * call.norm.shape.channels);
  run(&Backend::batch_norm_backward_sums, call.device, allocate, call.norm, grad, to);
}

void batch_norm_backward_input(const py::object& grad_output, const py::object& input, const py::object& mask,
                               const py::object& weight, const py::object& bias, const py::object& statistics,
                               const py::object& sums, double eps, const py::object& ceiling,
                               const py::object& grad_input, const py::object& grad_residual) {
  Call call(input, weight, bias, eps, ceiling);
  call.normalize_with(statistics, py::none(), py::none());
  BatchNormGradient grad;
  grad.grad_output = call.like_input(grad_output, "grad_output");
  grad.mask = call.mask(mask);
  grad.grad_input = call.like_input_or_none(grad_input, "grad_input");
  grad.grad_residual = call.like_input_or_none(grad_residual, "grad_residual");
  check_mask(call.norm, grad);
  const double* const from = call.float64(sums, "sums", 2 * call.norm.shape.channels);
  const double* const count = static_cast<const double*>(call.norm.mean.data) + 2 * call.norm.shape.channels;
  run(&Backend::batch_norm_backward_input, call.device, py::none(), call.norm, grad, from, count);
}

}  // namespace

void define_batch_norm(py::module_& module) {
  define(module, "batch_norm_layout", &batch_norm_layout, py::arg("input"));
  define(module, "batch_norm_statistics", &batch_norm_statistics, py::arg("input"), py::arg("statistics"),
         py::arg("allocate"));
  define(module, "batch_norm_forward", &batch_norm_forward, py::arg("input"), py::arg("residual"),
         py::arg("weight"), py::arg("bias"), py::arg("running_mean"), py::arg("running_var"),
         py::arg("num_batches_tracked"), py::arg("momentum"), py::arg("eps"), py::arg("ceiling"),
         py::arg("output"), py::arg("mask"), py::arg("statistics"), py::arg("allocate"));
  define(module, "batch_norm_normalize", &batch_norm_normalize, py::arg("input"), py::arg("residual"),
         py::arg("weight"), py::arg("bias"), py::arg("statistics"), py::arg("running_mean"),
         py::arg("running_var"), py::arg("eps"), py::arg("ceiling"), py::arg("output"), py::arg("mask"));
  define(module, "batch_norm_combine", &batch_norm_combine, py::arg("parts"), py::arg("statistics"),
         py::arg("running_mean"), py::arg("running_var"), py::arg("num_batches_tracked"),
         py::arg("momentum"));
  define(module, "batch_norm_backward", &batch_norm_backward, py::arg("grad_output"), py::arg("input"),
         py::arg("mask"), py::arg("weight"), py::arg("bias"), py::arg("statistics"), py::arg("running_mean"),
         py::arg("running_var"), py::arg("eps"), py::arg("ceiling"), py::arg("grad_input"),
         py::arg("grad_residual"), py::arg("grad_weight"), py::arg("grad_bias"), py::arg("allocate"));
  define(module, "batch_norm_backward_sums", &batch_norm_backward_sums, py::arg("grad_output"),
         py::arg("input"), py::arg("mask"), py::arg("weight"), py::arg("bias"), py::arg("statistics"),
         py::arg("eps"), py::arg("ceiling"), py::arg("sums"), py::arg("allocate"));
  define(module, "batch_norm_backward_input", &batch_norm_backward_input, py::arg("grad_output"),
         py::arg("input"), py::arg("mask"), py::arg("weight"), py::arg("bias"), py::arg("statistics"),
         py::arg("sums"), py::arg("eps"), py::arg("ceiling"), py::arg("grad_input"),
         py::arg("grad_residual"));
}

}  // namespace steadygrad::bindings
