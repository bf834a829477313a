// What the machine offers, and what to do when that is not enough.
#include <atomic>
#include <sstream>
#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/tensor_table.h"

namespace steadygrad::cuda {
namespace {

std::atomic<int64_t> launches{0};

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string architecture_text(int major, int minor) { return "sm_" + std::to_string(10 * major + minor); }

// Machine code runs on its architecture and later ones of the same major version; PTX on any later one.
// Asking the driver instead would make a context on every device.
bool is_compiled_for(int major, int minor) {
  const int device = 10 * major + minor;
  int architecture;
  for (std::istringstream list(STEADYGRAD_CUDA_MACHINE_CODE); list >> architecture;) {
    if (architecture / 10 == major && architecture <= device) return true;
  }
  for (std::istringstream list(STEADYGRAD_CUDA_PTX); list >> architecture;) {
    if (architecture <= device) return true;
  }
  return false;
}

std::string device_text() {
  int device = 0;
  cudaDeviceProp properties;
  if (cudaGetDevice(&device) != cudaSuccess || cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
    return "this device";
  }
  return std::string(properties.name) + " (" + architecture_text(properties.major, properties.minor) + ")";
}

std::string advice(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion: {
      int driver = 0;
      int runtime = 0;
      cudaDriverGetVersion(&driver);
      cudaRuntimeGetVersion(&runtime);
      return "expected a driver for CUDA " + version_text(runtime) + " or later, got one for CUDA " +
             version_text(driver) +
             ". Update the NVIDIA driver, or build steadygrad with an older CUDA toolkit";
    }
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return "expected one of the architectures compiled in (" STEADYGRAD_CUDA_ARCHITECTURES "), got " +
             device_text() + ". Build steadygrad from source with CUDAARCHS set to the device's architecture";
    case cudaErrorMemoryAllocation:
      return "the device has no memory left to load kernels; torch.cuda.empty_cache() returns what torch "
             "holds unused";
    case cudaErrorInitializationError:
      return "CUDA cannot be used in a forked process once its parent has used it; start processes with the "
             "spawn method";
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
      return std::string(cudaGetErrorString(error)) +
             ": this or an earlier kernel of the process failed, and the process must be restarted; "
             "CUDA_LAUNCH_BLOCKING=1 shows which kernel it was";
    default:
      return std::string("CUDA error ") + cudaGetErrorName(error) + ": " + cudaGetErrorString(error);
  }
}

}  // namespace

void check(cudaError_t error, const char* function) {
  if (error == cudaSuccess) return;
  const std::string text = advice(error);
  cudaGetLastError();  // not to be found by the next call
  throw std::runtime_error(std::string(function) + ": " + text);
}

void count_launch() { launches.fetch_add(1, std::memory_order_relaxed); }

int64_t launch_count() { return launches.load(std::memory_order_relaxed); }

BackendInfo backend_info() {
  BackendInfo info;
  info.compiled = true;
  info.architectures = STEADYGRAD_CUDA_ARCHITECTURES;
  cudaRuntimeGetVersion(&info.runtime_version);
  if (cudaDriverGetVersion(&info.driver_version) != cudaSuccess) info.driver_version = 0;
  int count = 0;
  const cudaError_t error = info.driver_version == 0 ? cudaErrorNoDevice : cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    info.problem = info.driver_version == 0 ? "no NVIDIA driver" : advice(error);
    cudaGetLastError();
    return info;
  }
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) continue;
    DeviceInfo& entry = info.devices.emplace_back();
    entry.name = properties.name;
    entry.major = properties.major;
    entry.minor = properties.minor;
    entry.usable = is_compiled_for(properties.major, properties.minor);
  }
  return info;
}

}  // namespace steadygrad::cuda
