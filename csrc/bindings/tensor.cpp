#include "bindings/tensor.h"

#include <algorithm>

namespace steadygrad::bindings {
namespace {

// References to torch's objects; they stay valid since torch is never unloaded.
struct Torch {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  const DLPackExchangeAPI* api = nullptr;
  PyObject* increment_version = nullptr;
  PyObject* get_num_threads = nullptr;
  PyObject* is_neg = nullptr;
  // The C functions behind is_neg and grad, if Python gives access to them: calling them directly takes half
  // the time.
  PyCFunction is_neg_function = nullptr;
  const PyGetSetDef* grad = nullptr;
};

Torch torch;

struct Added {
  int device_type = 0;
  const Backend* backend = nullptr;
};

Added added;

const DLPackExchangeAPI* compatible(const DLPackExchangeAPIHeader* header) {
  while (header != nullptr && header->version.major != DLPACK_MAJOR_VERSION) header = header->prev_api;
  return reinterpret_cast<const DLPackExchangeAPI*>(header);
}

std::string attribute_text(PyObject* object, const char* name) {
  return py::str(py::getattr(py::reinterpret_borrow<py::object>(object), name, py::str("unknown")));
}

DType dtype_of(const DLTensor& tensor, bool& is_complex, PyObject* object, const Argument& argument) {
  const DLDataType type = tensor.dtype;
  is_complex = type.code == kDLComplex;
  if (type.code == kDLFloat && type.bits == 32) return DType::float32;
  if (type.code == kDLFloat && type.bits == 64) return DType::float64;
  if (type.code == kDLFloat && type.bits == 16) return DType::float16;
  if (type.code == kDLBfloat && type.bits == 16) return DType::bfloat16;
  if (is_complex && type.bits == 64) return DType::float32;
  if (is_complex && type.bits == 128) return DType::float64;
  throw_type_error(argument, "a tensor of float32, float64, bfloat16 or float16", object);
}

bool is_tensor(PyObject* object) {
  return Py_TYPE(object) == torch.tensor || Py_TYPE(object) == torch.parameter;
}

// Returns false for an object that is no tensor; the function that takes it raises the error.
bool is_negated(PyObject* tensor) {
  if (!is_tensor(tensor)) return false;
  PyObject* const result = torch.is_neg_function != nullptr ? torch.is_neg_function(tensor, nullptr)
                                                            : PyObject_CallOneArg(torch.is_neg, tensor);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result).is(py::bool_(true));
}

// A freed storage leaves a data pointer of 0 plus the offset. On a 64-bit system no allocator returns
// addresses this low, except the heap of a fixed-position executable, so for a low address the storage itself
// is asked.
bool is_freed(const DLTensor& tensor, PyObject* object) {
  // The virtual memory of GPUs begins lower, but above any offset that occurs.
  const uintptr_t suspicious = uintptr_t{1} << (tensor.device.device_type == kDLCUDA ? 32 : 40);
  if (reinterpret_cast<uintptr_t>(tensor.data) >= suspicious) return false;
  if (tensor.data == nullptr) return true;
  const py::object storage = py::reinterpret_borrow<py::object>(object).attr("untyped_storage")();
  return storage.attr("nbytes")().cast<int64_t>() == 0;
}

bool is_dense(const View& view) {
  struct Dimension {
    int64_t stride, size;
  } dimensions[64];
  int count = 0;
  for (int d = 0; d < view.ndim; ++d) {
    if (view.sizes[d] != 1) dimensions[count++] = {view.strides[d], view.sizes[d]};
  }
  std::sort(dimensions, dimensions + count, [](Dimension a, Dimension b) { return a.stride < b.stride; });
  int64_t expected = 1;
  for (int d = 0; d < count; ++d) {
    if (dimensions[d].stride != expected) return false;
    expected *= dimensions[d].size;
  }
  return true;
}

// Returns false for real and imaginary parts of complex tensors, whose strides are all even.
bool has_unit_stride(const View& view) {
  return view.ndim == 0 || std::find(view.strides, view.strides + view.ndim, 1) != view.strides + view.ndim;
}

std::string supported_devices() {
  return backend_for(kDLCUDA) != nullptr ? " on the CPU or a CUDA device"
                                         : " on the CPU, the only backend compiled in";
}

// Returns the type of the device, where pinned memory counts as the CPU's.
int host_type(const DLDevice& found) {
  return found.device_type == kDLCUDAHost ? kDLCPU : static_cast<int>(found.device_type);
}

bool is_on(const DLDevice& found, const Device& device) {
  const int type = host_type(found);
  return type == device.type && (type == kDLCPU || found.device_id == device.index);
}

void check_device(const DLDevice& found, Device& device, PyObject* object, const Argument& argument) {
  const int type = host_type(found);
  if (backend_for(type) == nullptr) {
    throw_type_error(argument, "a tensor" + supported_devices(), object);
  }
  const int index = type == kDLCPU ? 0 : found.device_id;
  if (device.type == 0) device.set(type, index);
  if (device.type != type || device.index != index) {
    const std::string name = device.type == kDLCPU ? "the CPU" : "cuda:" + std::to_string(device.index);
    throw_type_error(argument, "a tensor on " + name + ", as the tensors before it are", object);
  }
}

DLTensor exported(PyObject* object, const Argument& argument) {
  DLTensor tensor;
  if (torch.api->dltensor_from_py_object_no_sync(object, &tensor) != 0) {
    PyErr_Clear();
    throw_type_error(argument, "a dense tensor" + supported_devices(), object);
  }
  return tensor;
}

const void* data_of(const DLTensor& tensor) {
  return static_cast<const char*>(tensor.data) + tensor.byte_offset;
}

uint64_t layout_of(const DLTensor& tensor) {
  uint64_t hash = static_cast<uint64_t>(tensor.dtype.code) << 8 | tensor.dtype.bits;
  const auto add = [&](int64_t number) {
    hash = (hash ^ static_cast<uint64_t>(number)) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
  };
  for (int d = 0; d < tensor.ndim; ++d) {
    add(tensor.shape[d]);
    add(tensor.strides[d]);
  }
  return hash;
}

DLTensor dl_tensor_of(PyObject* object, const Argument& argument, Device& device) {
  if (!is_tensor(object)) throw_type_error(argument, "a torch.Tensor or torch.nn.Parameter", object);
  const DLTensor tensor = exported(object, argument);
  check_device(tensor.device, device, object, argument);
  if (device.calls_python || device.backend->is_asynchronous) {
    device.looked.push_back(
        {py::reinterpret_borrow<py::object>(object), argument, data_of(tensor), layout_of(tensor)});
  }
  return tensor;
}

int64_t numel_of(const DLTensor& tensor) {
  int64_t numel = 1;
  for (int d = 0; d < tensor.ndim; ++d) numel *= tensor.shape[d];
  return numel;
}

void* memory_in(const DLTensor& tensor, PyObject* object, const Argument& argument) {
  if (numel_of(tensor) > 0 && is_freed(tensor, object)) {
    const bool is_zero = py::handle(object).attr("_is_zerotensor")().cast<bool>();
    throw std::runtime_error(argument.text() + ": expected a tensor with memory, got one " +
                             (is_zero ? "that torch keeps as zeros without any (torch._efficientzerotensor); "
                                        "clone() gives it some"
                                      : "whose storage was freed"));
  }
  return const_cast<void*>(data_of(tensor));
}

Operand operand_of(const View& view, bool linear) {
  return {view.data, linear ? nullptr : view.strides, view.dtype};
}

// Wraps a Python function so that C++ can call it after releasing the interpreter's lock.
std::function<void()> called_without_arguments(py::object function, const Device& device) {
  if (function.is_none()) return [] {};
  return [function = std::move(function), &device] {
    const py::gil_scoped_acquire acquire;
    function();
    look_again(device);
  };
}

}  // namespace

std::string Argument::text() const {
  std::string text = std::string(function) + ": " + name;
  if (index >= 0) text += "[" + std::to_string(index) + "]";
  return text + attribute;
}

std::string describe(PyObject* object) {
  const std::string type = Py_TYPE(object)->tp_name;
  if (torch.tensor == nullptr || !PyObject_TypeCheck(object, torch.tensor)) return type;
  return type + " (shape " + attribute_text(object, "shape") + ", dtype " + attribute_text(object, "dtype") +
         ", layout " + attribute_text(object, "layout") + ", device " + attribute_text(object, "device") +
         ")";
}

void throw_type_error(const Argument& argument, const std::string& expected, PyObject* got) {
  throw py::type_error(argument.text() + ": expected " + expected + ", got " + describe(got));
}

void import_torch() {
  const py::object tensor = py::module_::import("torch").attr("Tensor");
  const py::object parameter = py::module_::import("torch.nn").attr("Parameter");
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  void* header = nullptr;
  if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
    header = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  }
  const DLPackExchangeAPI* api = compatible(static_cast<const DLPackExchangeAPIHeader*>(header));
  if (api == nullptr || api->dltensor_from_py_object_no_sync == nullptr) {
    const std::string version = py::str(py::module_::import("torch").attr("__version__"));
    throw py::import_error(
        "steadygrad: expected torch >= 2.10, whose tensors offer the DLPack exchange API " +
        std::to_string(DLPACK_MAJOR_VERSION) + ".x, got torch " + version +
        ". Upgrade torch: pip install --upgrade 'torch>=2.10'");
  }
  torch.api = api;
  torch.get_num_threads = py::object(py::module_::import("torch").attr("get_num_threads")).release().ptr();
  torch.increment_version =
      py::object(py::module_::import("torch.autograd.graph").attr("increment_version")).release().ptr();
  torch.is_neg = py::object(tensor.attr("is_neg")).release().ptr();
  if (Py_TYPE(torch.is_neg) == &PyMethodDescr_Type) {
    const PyMethodDef* const method = reinterpret_cast<PyMethodDescrObject*>(torch.is_neg)->d_method;
    if (method->ml_flags == METH_NOARGS) torch.is_neg_function = method->ml_meth;
  }
  const py::object grad = tensor.attr("grad");
  if (Py_TYPE(grad.ptr()) == &PyGetSetDescr_Type) {
    torch.grad = reinterpret_cast<PyGetSetDescrObject*>(grad.ptr())->d_getset;
  }
  torch.tensor = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  torch.parameter = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
}

py::tuple exchange_api_version() {
  return py::make_tuple(torch.api->header.version.major, torch.api->header.version.minor);
}

View view_of(PyObject* object, const Argument& argument, Device& device) {
  const DLTensor tensor = dl_tensor_of(object, argument, device);
  View view;
  view.dtype = dtype_of(tensor, view.is_complex, object, argument);
  view.data = memory_in(tensor, object, argument);
  view.numel = numel_of(tensor);
  view.ndim = tensor.ndim;
  view.sizes = tensor.shape;
  view.strides = tensor.strides;
  return view;
}

void* vector_of(PyObject* object, const Argument& argument, DLDataType dtype, int64_t numel, Device& device) {
  const DLTensor tensor = dl_tensor_of(object, argument, device);
  View view;
  view.ndim = tensor.ndim;
  view.sizes = tensor.shape;
  view.strides = tensor.strides;
  if (tensor.dtype.code != dtype.code || tensor.dtype.bits != dtype.bits || numel_of(tensor) != numel ||
      !is_contiguous(view)) {
    const char* const kind = dtype.code == kDLFloat ? "float" : dtype.code == kDLInt ? "int" : "uint";
    throw_type_error(argument,
                     "a contiguous " + std::string(kind) + std::to_string(dtype.bits) + " tensor of " +
                         std::to_string(numel) + " elements",
                     object);
  }
  if (dtype.code == kDLFloat) check_not_negated(object, argument);
  return memory_in(tensor, object, argument);
}

py::object local_tensor(const py::object& tensor) {
  if (is_tensor(tensor.ptr())) return tensor;
  static PyObject* const kLocal = PyUnicode_InternFromString("_local_tensor");
  PyObject* const local = PyObject_GetAttr(tensor.ptr(), kLocal);
  if (local != nullptr) return py::reinterpret_steal<py::object>(local);
  PyErr_Clear();  // it is no DTensor, and the function that takes it raises the error
  return tensor;
}

Reduction reduction_of(const char* function, const ReductionMemory* memory, size_t groups, size_t slots,
                       bool per_tensor, Device& device) {
  Reduction reduction;
  if (memory == nullptr) return reduction;
  const int64_t rows = static_cast<int64_t>(1 + groups + (per_tensor ? slots : 0));
  reduction.rows = static_cast<ScopeSums*>(
      vector_of(memory->rows.ptr(), {function, "rows", -1}, {kDLFloat, 64, 1}, rows * kScopeColumns, device));
  reduction.counted =
      static_cast<const int32_t*>(vector_of(memory->counted.ptr(), {function, "counted", -1}, {kDLInt, 32, 1},
                                            static_cast<int64_t>(slots), device));
  reduction.slots = static_cast<int32_t>(slots);
  reduction.per_tensor = per_tensor;
  reduction.reduce = called_without_arguments(memory->reduce, device);
  if (!memory->ask_policy.is_none()) {
    reduction.ask_policy = called_without_arguments(memory->ask_policy, device);
  }
  return reduction;
}

Device device_named(const py::object& device) {
  Device named;
  const std::string type = device.is_none() ? "cpu" : std::string(py::str(device.attr("type")));
  if (type == "cpu") {
    named.set(kDLCPU, 0);
  } else {
    const py::object index = device.attr("index");
    named.set(type == "cuda" ? kDLCUDA : -1, index.is_none() ? 0 : index.cast<int>());
  }
  return named;
}

bool is_number_on(const Device& device, PyObject* value) {
  DLTensor tensor;
  if (!is_tensor(value)) return false;
  if (torch.api->dltensor_from_py_object_no_sync(value, &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  const bool is_there = is_on(tensor.device, device);
  return is_there && numel_of(tensor) == 1 && tensor.dtype.code == kDLFloat &&
         (tensor.dtype.bits == 32 || tensor.dtype.bits == 64);
}

Number number_on(PyObject* tensor, const Argument& argument, Device& device, Found& found) {
  const View view = view_of(tensor, argument, device);
  check_not_negated(tensor, view, argument, found);
  if (view.numel != 1 || (view.dtype != DType::float32 && view.dtype != DType::float64)) {
    throw_type_error(argument, "a float32 or float64 tensor of one element", tensor);
  }
  return {view.data, view.dtype};
}

Number number_on(PyObject* tensor, const Argument& argument, Device& device) {
  Found found;
  return number_on(tensor, argument, device, found);
}

bool is_elsewhere(const Device& device, PyObject* tensor) {
  DLTensor found;
  if (!is_tensor(tensor)) return false;
  if (torch.api->dltensor_from_py_object_no_sync(tensor, &found) != 0) {
    PyErr_Clear();
    return false;
  }
  return backend_for(host_type(found.device)) != nullptr && !is_on(found.device, device);
}

void check_writable(const View& view, const Argument& argument) {
  if (view.numel == 0) return;
  for (int d = 0; d < view.ndim; ++d) {
    if (view.sizes[d] > 1 && view.strides[d] == 0) {
      throw py::value_error(
          argument.text() +
          ": expected a tensor whose elements have memory of their own, got an expanded one; clone it");
    }
  }
}

py::object resolved(PyObject* tensor) {
  const py::object given = py::reinterpret_borrow<py::object>(tensor);
  return is_negated(tensor) ? py::object(given.attr("resolve_neg")()) : given;
}

void check_not_negated(PyObject* tensor, const Argument& argument) {
  if (is_negated(tensor)) {
    throw py::type_error(argument.text() +
                         ": expected a tensor whose memory holds its values, got a lazily negated one; "
                         "call resolve_neg() on it");
  }
}

void check_not_negated(PyObject* tensor, const View& view, const Argument& argument, Found& found) {
  const bool is_known = found.object == tensor && found.data == view.data && has_unit_stride(view);
  if (!is_known) check_not_negated(tensor, argument);
  found = {tensor, view.sizes, view.data};
}

py::object grad_of(PyObject* tensor) {
  static PyObject* const kGrad = PyUnicode_InternFromString("grad");
  PyObject* const grad = torch.grad != nullptr && is_tensor(tensor)
                             ? torch.grad->get(tensor, torch.grad->closure)
                             : PyObject_GetAttr(tensor, kGrad);
  if (grad == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(grad);
}

void look_again(const Device& device) {
  for (const Looked& before : device.looked) {
    const DLTensor now = exported(before.tensor.ptr(), before.argument);
    if (data_of(now) == before.data && layout_of(now) == before.layout) continue;
    throw std::runtime_error(before.argument.text() +
                             ": expected a tensor that stays as it is while Python code runs in the middle "
                             "of a call (a clip policy, a "
                             "reduction, an allocation), got one whose memory, shape or dtype was replaced");
  }
}

void* allocated(const py::object& allocate, int64_t bytes, Device& device, std::vector<py::object>& kept) {
  const py::object& tensor = kept.emplace_back(allocate(bytes));
  if (Py_TYPE(tensor.ptr()) != torch.tensor) {
    throw py::type_error(
        "steadygrad: expected torch.empty to give memory, got " + describe(tensor.ptr()) +
        "; kernels cannot run where a mode or a transform puts other tensors in the place of real ones");
  }
  look_again(device);
  return vector_of(tensor.ptr(), {"steadygrad", "allocate", -1}, {kDLUInt, 8, 1}, bytes, device);
}

void add_backend(int device_type, const Backend& backend) { added = {device_type, &backend}; }

const Backend* backend_for(int device_type) {
  if (device_type == added.device_type) return added.backend;
  return device_type == kDLCPU ? &cpu_backend() : nullptr;
}

void Device::set(int device_type, int device_index) {
  type = device_type;
  index = device_index;
  if (const Backend* const found = backend_for(type)) backend = found;
}

Stream current_stream(const Device& device) {
  Stream stream;
  stream.device = device.index;
  if (device.type != kDLCUDA) return stream;
  if (torch.api->current_work_stream(kDLCUDA, device.index, &stream.handle) != 0)
    throw py::error_already_set();
  return stream;
}

void adopt_torch_threads() { py::handle(torch.get_num_threads)(); }

void announce_write(const py::list& tensors) { py::handle(torch.increment_version)(tensors); }

bool same_sizes(const View& a, const View& b) {
  if (a.ndim != b.ndim) return false;
  // A loop is faster here than calling memcmp for a few sizes.
  for (int d = 0; d < a.ndim; ++d) {
    if (a.sizes[d] != b.sizes[d]) return false;
  }
  return true;
}

bool is_contiguous(const View& view) {
  int64_t expected = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    if (view.sizes[d] != 1 && view.strides[d] != expected) return false;
    expected *= view.sizes[d];
  }
  return true;
}

bool same_strides(const View& a, const View& b) {
  for (int d = 0; d < a.ndim; ++d) {
    if (a.sizes[d] != 1 && a.strides[d] != b.strides[d]) return false;
  }
  return true;
}

TensorOperands operands_of(const View& view, Operand TensorOperands::* operand) {
  TensorOperands tensor;
  tensor.numel = view.is_complex ? 2 * view.numel : view.numel;
  tensor.ndim = view.ndim;
  tensor.sizes = view.sizes;
  tensor.*operand = operand_of(view, view.numel == 0 || is_contiguous(view) || is_dense(view));
  return tensor;
}

void set_operands(TensorOperands& tensor, const View* views, Operand* const* operands, int count,
                  bool by_unit) {
  tensor.numel = views[0].numel;
  tensor.ndim = views[0].ndim;
  tensor.sizes = views[0].sizes;
  const View& first = views[0];
  const bool units_lie_together =
      first.ndim < 2 || first.sizes[0] < 2 || first.strides[0] * first.sizes[0] == first.numel;
  bool together =
      first.numel == 0 || is_contiguous(first) || (is_dense(first) && (units_lie_together || !by_unit));
  for (int i = 1; i < count; ++i) together = together && same_strides(views[0], views[i]);
  for (int i = 0; i < count; ++i) *operands[i] = operand_of(views[i], together || is_contiguous(views[i]));
}

}  // namespace steadygrad::bindings
