// Python tensors as views, through the DLPack exchange API, with every check that the API itself leaves out.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <dlpack/dlpack.h>
#include <pybind11/pybind11.h>

#include "core/backend.h"

namespace steadygrad::bindings {

namespace py = pybind11;

// Which argument a message is about: "parameters[3].grad".
struct Argument {
  const char* function;
  const char* name;
  Py_ssize_t index;
  const char* attribute = "";

  std::string text() const;
};

// Has tensors on devices of this DLPack type go to a backend; the CPU's are the CPU backend's but for that.
void add_backend(int device_type, const Backend& backend);

// The backend for devices of this DLPack type; null where none takes their tensors.
const Backend* backend_for(int device_type);

// A tensor as one call has found it.
struct Looked {
  py::object tensor;
  Argument argument;
  const void* data;
  uint64_t layout;  // from its dtype, sizes and strides
};

// Where the tensors of one call are: the first one that is looked at sets it.
struct Device {
  int type = 0;  // DLPack's; 0: not set yet
  int index = 0;
  const Backend* backend = &cpu_backend();
  bool calls_python = false;   // whether Python runs between the look at the tensors and their use
  std::vector<Looked> looked;  // all of them, where it does; with the CUDA backend it always may

  void set(int device_type, int device_index);
};

// Of a torch.device; None is the CPU.
Device device_named(const py::object& device);

// Whether it is a number in a tensor on this device: one of float32 or float64 with one element.
bool is_number_on(const Device& device, PyObject* value);
Number number_on(PyObject* tensor, const Argument& argument, Device& device);

// Whether a tensor lies on another device that a backend takes.
bool is_elsewhere(const Device& device, PyObject* tensor);

// After Python has run: throws RuntimeError where one of the tensors has other memory than it had.
void look_again(const Device& device);

// Valid until control returns to Python: sizes and strides belong to the tensor.
struct View {
  void* data;
  int64_t numel;
  DType dtype;
  bool is_complex;  // pairs of `dtype`
  int ndim;
  const int64_t* sizes;
  const int64_t* strides;
};

// Looks torch up once; throws ImportError with what to do when this torch cannot be used.
void import_torch();

py::tuple exchange_api_version();

// Throws TypeError, ValueError or RuntimeError when `object` is not a dense tensor of a type and on a device
// the kernels take, or on another device than the tensors before it.
View view_of(PyObject* object, const Argument& argument, Device& device);

// The memory of a contiguous tensor of exactly this dtype and number of elements; throws TypeError for
// another, and for one that is lazily negated.
void* vector_of(PyObject* object, const Argument& argument, DLDataType dtype, int64_t numel, Device& device);

// A DTensor's part of this process, else the tensor itself; the DTensor keeps it alive.
py::object local_tensor(const py::object& tensor);

// What Python gives for a reduction (core/scope_sums.h): tensors, and functions without arguments or None.
struct ReductionMemory {
  py::object rows;
  py::object counted;
  py::object reduce;
  py::object ask_policy;
};

// `memory`: null where there is nothing to reduce. `slots`: how many tensors may take part.
Reduction reduction_of(const char* function, const ReductionMemory* memory, size_t groups, size_t slots,
                       bool per_tensor, Device& device);

// torch's current stream on a CUDA device.
Stream current_stream(const Device& device);

// The memory of a tensor that Python made for a kernel to fill, or null for None.
template <class T>
T* memory_of(const py::object& tensor, const Argument& argument, DLDataType dtype, int64_t numel,
             Device& device) {
  if (tensor.is_none()) return nullptr;
  return static_cast<T*>(vector_of(tensor.ptr(), argument, dtype, numel, device));
}

// Asks Python for device memory; `kept` gets the tensor that owns it.
void* allocated(const py::object& allocate, int64_t bytes, Device& device, std::vector<py::object>& kept);

// The same for one call: keeps what it gets for as long as this object lives.
class Allocator {
 public:
  Allocator(py::object allocate, Device& device) : allocate_(std::move(allocate)), device_(device) {}

  void* operator()(int64_t bytes) { return allocated(allocate_, bytes, device_, kept_); }

 private:
  py::object allocate_;
  Device& device_;
  std::vector<py::object> kept_;
};

// Gives the calling thread torch's number of threads: OpenMP keeps one per thread, and torch sets it when
// asked.
void adopt_torch_threads();

// Calls function(backend, stream). What works on the host does so without the interpreter's lock, and on
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

// Throws where writing would be wrong: elements that share memory.
void check_writable(const View& view, const Argument& argument);

// torch negates some views lazily, such as .imag of a conjugate, and DLPack does not tell: their memory holds
// the values with the other sign. Norms and clips are the same for both; whoever adds a tensor to another one
// takes resolved() of those that it reads, and calls check_not_negated() for those that it writes, which
// throws TypeError.
py::object resolved(PyObject* tensor);
void check_not_negated(PyObject* tensor, const Argument& argument);

// Bumps the tensors' autograd versions, which writing through a pointer does not: a graph that saved one of
// them then refuses to run backward. Inference tensors have no version and cannot be saved.
void announce_write(const py::list& tensors);

bool same_sizes(const View& a, const View& b);

// Both leave dimensions of one element out.
bool same_strides(const View& a, const View& b);
bool is_contiguous(const View& view);

// A single operand: elements are visited in memory order where they fill their memory, else by index.
TensorOperands operands_of(const View& view, Operand TensorOperands::* operand);

// Several operands of equal sizes, visited together. `operands` and `views` correspond. `by_unit`: all
// elements of one index of the first dimension one after the other.
void set_operands(TensorOperands& tensor, const View* views, Operand* const* operands, int count,
                  bool by_unit = false);

std::string describe(PyObject* object);

[[noreturn]] void throw_type_error(const Argument& argument, const std::string& expected, PyObject* got);

}  // namespace steadygrad::bindings
