// The operations of the CUDA backend. Arguments are checked by the caller; nothing here knows Python. Work is
// queued on the caller's stream: nothing waits for the device, and results stay there.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/scope_sums.h"
#include "core/step.h"
#include "core/step_memory.h"
#include "core/tensors.h"

namespace steadygrad::cuda {

using Tensors = std::vector<TensorOperands>;

struct Stream {
  int device = 0;
  void* handle = nullptr;
};

// Device memory for one call. Its owner is the caller: nothing here allocates on the device.
using Allocate = std::function<void*(int64_t bytes)>;

// A reduction's `rows` and `counted` are device memory, and what it queues follows on the same stream.
void grad_norm(const Tensors& tensors, NormType type, const NormOutput& output, const Reduction& reduction,
               const Allocate& allocate, Stream stream);

// With refuse_nonfinite, non-finite gradients stay as they are and the outcome says so.
void clip_grad_norm(const Tensors& tensors, double max_norm, NormType type, bool refuse_nonfinite,
                    const NormOutput& output, const Reduction& reduction, const Allocate& allocate,
                    Stream stream);

// A norm in device memory.
struct DeviceNumber {
  const void* data = nullptr;
  DType dtype = DType::float32;
};

void clip_grads_with_norm(const Tensors& tensors, double max_norm, DeviceNumber total_norm,
                          const Allocate& allocate, Stream stream);

void transform_grads(const Tensors& tensors, const TransformOptions& options, const Allocate& allocate,
                     Stream stream);

// Adds l1 * sign(param) + l2 * param to the gradients; `value` gets l1 * sum|param| + l2 / 2 * sum param^2.
void add_penalty(const Tensors& tensors, double l1, double l2, double* value, const Allocate& allocate,
                 Stream stream);

void soft_threshold(const Tensors& tensors, double amount, const Allocate& allocate, Stream stream);

// A param group whose learning rate may live on the device, so that a captured graph follows it.
struct DeviceGroup {
  GroupOptions options;
  DeviceNumber lr;
};

// Steps one set of tensors again and again. What does not change from step to step stays in device memory;
// every step compares it with the tensors it is given.
class StepPlan {
 public:
  void step(const Tensors& tensors, const std::vector<StepCounter>& counters,
            const std::vector<DeviceGroup>& groups, const StepOptions& options, const StepMemory& memory,
            const Reduction& reduction, const Allocate& allocate, Stream stream);

  // Whether a step was captured into a graph, whose replays use this plan's device memory.
  bool captured() const { return captured_; }

 private:
  // Unused where CUDA is absent.
  [[maybe_unused]] void* base_ = nullptr;
  [[maybe_unused]] int64_t capacity_ = 0;
  bool captured_ = false;
  std::vector<uint64_t> image_;  // what the device's table holds
};

// Whose tensors this backend takes: those of CUDA devices, or where the kernels are emulated those of the
// CPU.
enum class Devices : uint8_t { none, cuda, cpu };
Devices devices();

// Kernels launched by this process so far.
int64_t launch_count();

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

BackendInfo backend_info();

}  // namespace steadygrad::cuda
