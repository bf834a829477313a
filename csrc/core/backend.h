// What a backend can do: its table of operations, which the bindings call through. Arguments are checked by
// the caller, and nothing here knows Python.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "core/scope_sums.h"
#include "core/step.h"
#include "core/step_memory.h"
#include "core/tensors.h"

namespace steadygrad {

struct BatchNorm;
struct BatchNormGradient;
struct BatchNormOutput;
struct RunningStatistics;

using Tensors = std::vector<TensorOperands>;

// Where an asynchronous backend queues its work; the CPU has none.
struct Stream {
  int device = 0;
  void* handle = nullptr;
};

// Gives memory on the stream's device for the time of one call, and owns it. The CPU asks for none.
using Allocate = std::function<void*(int64_t bytes)>;

// Is called before anything is written, and only where something may be; if it throws, nothing has changed.
using BeforeWrite = std::function<void(bool writes_grads)>;

// What an asynchronous backend keeps on the device from one step of a plan to the next. Every step compares
// it with the tensors it is given, and brings anew what has changed.
struct StepTable {
  void* base = nullptr;
  int64_t capacity = 0;
  bool captured = false;        // whether a step was captured into a graph, whose replays use this memory
  std::vector<uint64_t> image;  // what stands there
};

struct DeviceInfo {
  std::string name;
  int major = 0;
  int minor = 0;
  bool usable = false;  // whether kernels were compiled for it
};

struct BackendInfo {
  bool compiled = false;
  std::string architectures;
  int runtime_version = 0;
  int driver_version = 0;  // 0: no driver
  std::string problem;     // why no device can be used; empty if one can
  std::vector<DeviceInfo> devices;
};

// An asynchronous backend queues its work on the stream and waits for nothing: whatever an operation reads or
// leaves, counters and outcomes too, is memory of the device. The CPU's is the host's, and done on return.
struct Backend {
  bool is_asynchronous;

  // These two are null on the CPU. Kernels launched by this process so far:
  int64_t (*launch_count)();
  BackendInfo (*info)();

  // The norm of all gradients. With a reduction it is that of all processes' tensors.
  void (*grad_norm)(const Tensors&, NormType, const NormOutput&, const Reduction&, const Allocate&, Stream);

  // The norm, then the clip. With refuse_nonfinite, non-finite gradients stay as they are and the outcome
  // says so.
  void (*clip_grad_norm)(const Tensors&, double max_norm, NormType, bool refuse_nonfinite, const NormOutput&,
                         const Reduction&, const BeforeWrite&, const Allocate&, Stream);

  // The clip alone, to a norm that is known.
  void (*clip_grads_with_norm)(const Tensors&, double max_norm, Number total_norm, const Allocate&, Stream);

  // grad = transform(grad)
  void (*transform_grads)(const Tensors&, const TransformOptions&, const Allocate&, Stream);

  // Adds l1 * sign(param) + l2 * param to the gradients; `value` gets l1 * sum|param| + l2 / 2 * sum param^2.
  void (*add_penalty)(const Tensors&, double l1, double l2, double* value, const Allocate&, Stream);

  // param = sign(param) * max(|param| - amount, 0)
  void (*soft_threshold)(const Tensors&, double amount, const Allocate&, Stream);

  // One whole step in two passes: the norm, the decision, the update. Policies learn from the norm before
  // before_write is called; what it stops is not recorded.
  void (*step)(const Tensors&, const std::vector<StepCounter>&, const std::vector<GroupOptions>&,
               const StepOptions&, const StepMemory&, const Reduction&, const BeforeWrite&, StepTable&,
               const Allocate&, Stream);

  // statistics(mean, biased variance, count) of this input.
  void (*batch_norm_statistics)(const BatchNorm&, double* statistics, const Allocate&, Stream);

  // Finds the batch's statistics, leaves them in `statistics`, updates the running ones, and normalises.
  void (*batch_norm_forward)(const BatchNorm&, const BatchNormOutput&, double* statistics,
                             const RunningStatistics&, const Allocate&, Stream);

  // Normalises with norm.mean and norm.var.
  void (*batch_norm_normalize)(const BatchNorm&, const BatchNormOutput&, const Allocate&, Stream);

  // The statistics of all parts together, from one vector of statistics of each part; updates the running
  // ones.
  void (*batch_norm_combine)(const double* parts, int64_t count, int64_t channels, double* statistics,
                             const RunningStatistics&, const Allocate&, Stream);

  // With constant_statistics mean and var do not depend on the input.
  void (*batch_norm_backward)(const BatchNorm&, const BatchNormGradient&, bool constant_statistics,
                              const Allocate&, Stream);

  // sums: sum(grad) of each channel, then sum(grad * (x - mean)).
  void (*batch_norm_backward_sums)(const BatchNorm&, const BatchNormGradient&, double* sums, const Allocate&,
                                   Stream);

  // The input's and the residual's gradients from the sums over everything that the statistics were taken
  // from, `*count` elements a channel.
  void (*batch_norm_backward_input)(const BatchNorm&, const BatchNormGradient&, const double* sums,
                                    const double* count, const Allocate&, Stream);
};

const Backend& cpu_backend();

// Defined where the kernels of csrc/cuda are built, for a GPU or for the emulator.
const Backend& cuda_backend();

// The type of an operation, to declare a backend's own function by.
template <class Pointer>
using OperationOf = std::remove_pointer_t<Pointer>;

}  // namespace steadygrad
