// Python tensors as views, through the DLPack exchange API, with every check that the API itself leaves out.
#pragma once

#include <string>
#include <vector>

#include <dlpack/dlpack.h>
#include <pybind11/pybind11.h>

#include "core/tensors.h"
#include "cuda/operations.h"

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

// DLPack's type of the devices whose tensors the CUDA backend takes; -1: it takes none.
int cuda_backend_type();

// Where the tensors of one call are: the first one that is looked at sets it.
struct Device {
  int type = 0;  // DLPack's; 0: not set yet
  int index = 0;

  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
  // Whether its tensors go to the CUDA backend: also those of the CPU, where its kernels are emulated.
  bool is_cuda() const { return type != 0 && type == cuda_backend_type(); }
};

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
// another.
void* vector_of(PyObject* object, const Argument& argument, DLDataType dtype, int64_t numel, Device& device);

// A DTensor's part of this process, else the tensor itself; the DTensor keeps it alive.
py::object local_tensor(const py::object& tensor);

// `tensors`: None, or (rows, counted, function without arguments that combines the rows of all processes or
// None) and perhaps another one that asks a policy, see core/scope_sums.h. `slots`: how many tensors may take
// part.
Reduction reduction_of(const char* function, const py::object& tensors, size_t groups, size_t slots,
                       bool per_tensor, Device& device);

// torch's current stream on a device of the CUDA backend.
cuda::Stream current_stream(Device device);

// The memory of a tensor that Python made for a kernel to fill.
void* address_of(const py::handle& tensor);
template <class T>
T* memory_of(const py::handle& tensor) {
  return tensor.is_none() ? nullptr : static_cast<T*>(address_of(tensor));
}

// Asks Python for device memory, and keeps what it gets for as long as this object lives.
class Allocator {
 public:
  explicit Allocator(py::object allocate) : allocate_(std::move(allocate)) {}

  void* operator()(int64_t bytes) {
    kept_.push_back(allocate_(bytes));
    return memory_of<void>(kept_.back());
  }

 private:
  py::object allocate_;
  std::vector<py::object> kept_;
};

// Throws where writing would be wrong: elements that share memory.
void check_writable(const View& view, const Argument& argument);

// Throws for a view that torch negates lazily, such as .imag of a conjugate: adding to its memory would have
// the wrong sign. DLPack does not tell; views from public functions skip memory, so only
// such are asked.
void check_not_negated(const View& view, PyObject* object, const Argument& argument);

// Gives the calling thread torch's number of threads: OpenMP keeps one per thread, and torch sets it when
// asked.
void adopt_torch_threads();

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
