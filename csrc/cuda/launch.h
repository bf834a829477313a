// What every launcher does around a kernel: device guard, stream, launch, check.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>
#include <utility>

#include "core/backend.h"

namespace steadygrad::cuda {

// Throws what went wrong, in which function, and what to do about it.
void check(cudaError_t error, const char* function);

void count_launch();

class DeviceGuard {
 public:
  DeviceGuard(int device, const char* function) {
    check(cudaGetDevice(&previous_), function);
    if (previous_ != device) check(cudaSetDevice(device), function);
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

template <class... Parameters, class... Arguments>
void launch(const char* function, Stream stream, void (*kernel)(Parameters...), int64_t blocks, int threads,
            Arguments&&... arguments) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream.handle);
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), function);
  count_launch();
}

inline int64_t blocks_for(int64_t work, int64_t per_block) { return (work + per_block - 1) / per_block; }

}  // namespace steadygrad::cuda
