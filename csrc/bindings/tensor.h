// Views of Python's tensors by the DLPack exchange API, with every check that the API itself leaves out.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <dlpack/dlpack.h>
#include <pybind11/pybind11.h>

#include "core/backend.h"

namespace steadygrad::bindings {

namespace py = pybind11;

// Names the argument that a message is about, such as "parameters[3].grad".
struct Argument {
  const char* function;
  const char* name;
  Py_ssize_t index;
  const char* attribute = "";

  std::string text() const;
};

// Makes tensors on devices of this DLPack type go to a backend. Without it the CPU's go to the CPU backend.
void add_backend(int device_type, const Backend& backend);

// Returns the backend for devices of this DLPack type; null if no backend takes their tensors.
const Backend* backend_for(int device_type);

// A tensor as a call has found it.
struct Looked {
  py::object tensor;
  Argument argument;
  const void* data;
  uint64_t layout;  // a hash of its dtype, sizes and strides
};

// The device of one call's tensors; the first tensor that is looked at sets it.
struct Device {
  int type = 0;  // DLPack's type of device; 0 if not set yet
  int index = 0;
  const Backend* backend = &cpu_backend();
  bool calls_python = false;  // whether Python runs between the look at the tensors and their use
  std::vector<Looked>
      looked;  // the tensors looked at, if Python runs in between; with the CUDA backend it always may

  void set(int device_type, int device_index);
};

// Returns the device that a torch.device names; None is the CPU.
Device device_named(const py::object& device);

// A tensor as a step has found it. The addresses are only compared and prefetched, never dereferenced.
struct Found {
  const PyObject* object = nullptr;
  const void* sizes = nullptr;
  const void* data = nullptr;
};

// Returns whether the value is a number on this device: a float32 or float64 tensor of one element.
bool is_number_on(const Device& device, PyObject* value);
Number number_on(PyObject* tensor, const Argument& argument, Device& device);
Number number_on(PyObject* tensor, const Argument& argument, Device& device, Found& found);

// Returns whether a tensor is on another device that a backend takes.
bool is_elsewhere(const Device& device, PyObject* tensor);

// Checks the tensors after Python has run: throws RuntimeError if one of them has other memory than before.
void look_again(const Device& device);

// A tensor's memory and layout, valid until control returns to Python: sizes and strides belong to the
// tensor.
struct View {
  void* data;
  int64_t numel;
  DType dtype;
  bool is_complex;  // whether elements are pairs of `dtype`
  int ndim;
  const int64_t* sizes;
  const int64_t* strides;
};

// Looks up torch's objects once; throws an ImportError that says what to do if this torch cannot be used.
void import_torch();

py::tuple exchange_api_version();

// Returns a view of a tensor. Throws TypeError, ValueError or RuntimeError if it is not a dense tensor of a
// dtype and on a device that the kernels take, or if it is on another device than the tensors before it.
View view_of(PyObject* object, const Argument& argument, Device& device);

// Returns the memory of a contiguous tensor of exactly this dtype and number of elements. Throws TypeError
// for any other tensor, and for one that is lazily negated.
void* vector_of(PyObject* object, const Argument& argument, DLDataType dtype, int64_t numel, Device& device);

// Returns the part of a DTensor that this process holds, which the DTensor keeps alive, or any other tensor
// itself.
py::object local_tensor(const py::object& tensor);

// What Python passes for a reduction (core/scope_sums.h): tensors, and functions without arguments or None.
struct ReductionMemory {
  py::object rows;
  py::object counted;
  py::object reduce;
  py::object ask_policy;
};

// `memory` is null if there is nothing to reduce. `slots` is the number of tensors that may take part.
Reduction reduction_of(const char* function, const ReductionMemory* memory, size_t groups, size_t slots,
                       bool per_tensor, Device& device);

// Returns torch's current stream on a CUDA device.
Stream current_stream(const Device& device);

// Returns the memory of a tensor that Python made for a kernel to write to, or null for None.
template <class T>
T* memory_of(const py::object& tensor, const Argument& argument, DLDataType dtype, int64_t numel,
             Device& device) {
  if (tensor.is_none()) return nullptr;
  return static_cast<T*>(vector_of(tensor.ptr(), argument, dtype, numel, device));
}

// Asks Python for device memory; `kept` receives the tensor that owns it.
void* allocated(const py::object& allocate, int64_t bytes, Device& device, std::vector<py::object>& kept);

// Asks Python for device memory, and keeps it for as long as this object lives.
class Allocator {
 public:
  Allocator(py::object allocate, Device& device) : allocate_(std::move(allocate)), device_(device) {}

  void* operator()(int64_t bytes) { return allocated(allocate_, bytes, device_, kept_); }

 private:
  py::object allocate_;
  Device& device_;
  std::vector<py::object> kept_;
};

// Gives the calling thread torch's number of threads: OpenMP keeps that number per thread, and torch sets it
// when it is asked for the number.
void adopt_torch_threads();

// Calls function(backend, stream). A backend that works on the host runs without the interpreter's lock, on
// torch's number of threads.
template <class Function>
void on_backend(const Device& device, Function function) {
  const Stream stream = current_stream(device);
  if (device.backend->is_asynchronous) return function(*device.backend, stream);
  adopt_torch_threads();
  const py::gil_scoped_release release;
  function(*device.backend, stream);
}

// Calls an operation of the table, with scratch space for the time of the call.
template <class Operation, class... Arguments>
void run(Operation Backend::* operation, Device& device, const py::object& allocate,
         const Arguments&... arguments) {
  Allocator allocator(allocate, device);
  on_backend(device, [&](const Backend& backend, Stream stream) {
    (backend.*operation)(arguments..., std::ref(allocator), stream);
  });
}

// Throws if the tensor must not be written to because elements share memory.
void check_writable(const View& view, const Argument& argument);

// torch negates some views lazily, such as .imag of a conjugate, and DLPack does not tell: their memory holds
// the values with the opposite sign. That makes no difference to norms and clips. A function that adds one
// tensor to another takes resolved() of those that it reads. For those that it writes it calls
// check_not_negated(), which throws TypeError.
py::object resolved(PyObject* tensor);
void check_not_negated(PyObject* tensor, const Argument& argument);

// Checks a tensor that is kept alive from step to step, and remembers it in `found`. torch is asked for the
// sign only if the tensor or its memory is another one than the last time, or if it may be a part of a
// complex tensor, since asking takes longer than the rest of a look.
void check_not_negated(PyObject* tensor, const View& view, const Argument& argument, Found& found);

// Returns a tensor's gradient, or None.
py::object grad_of(PyObject* tensor);

// Bumps the tensors' autograd versions, which writing through a pointer does not do. A graph that has saved
// one of the tensors then refuses to run backward. Inference tensors have no version and cannot be saved.
void announce_write(const py::list& tensors);

bool same_sizes(const View& a, const View& b);

// Both functions ignore dimensions of size 1.
bool same_strides(const View& a, const View& b);
bool is_contiguous(const View& view);

// Returns a single operand, whose elements are visited in memory order if they fill their memory, else by
// index.
TensorOperands operands_of(const View& view, Operand TensorOperands::* operand);

// Sets several operands of equal sizes that are visited together; `operands` and `views` correspond. With
// `by_unit`, the elements of one index of the first dimension are visited one after the other.
void set_operands(TensorOperands& tensor, const View* views, Operand* const* operands, int count,
                  bool by_unit = false);

std::string describe(PyObject* object);

[[noreturn]] void throw_type_error(const Argument& argument, const std::string& expected, PyObject* got);

}  // namespace steadygrad::bindings
