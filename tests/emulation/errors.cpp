#include "emulation/errors.h"

#include <atomic>
#include <cstdio>
#include <list>
#include <mutex>

#include "emulation/settings.h"

namespace steadygrad::emulation {
namespace {

struct Known {
  cudaError_t error;
  const char* name;
  const char* text;
};

constexpr Known kKnown[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources",
     "too many resources requested for launch"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorCooperativeLaunchTooLarge, "cudaErrorCooperativeLaunchTooLarge",
     "too many blocks in cooperative launch"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
};

const Known* find(cudaError_t error) {
  for (const Known& known : kKnown) {
    if (known.error == error) return &known;
  }
  return nullptr;
}

// Each OS thread has its own, as in CUDA. Worker threads, which fill such variables, have none to report.
thread_local cudaError_t last_error = cudaSuccess;

// The reasons why kernels failed. They live as long as the process, since callers of cudaGetErrorString hold
// pointers to them.
struct Reasons {
  std::mutex mutex;
  std::list<std::string> texts;
};

Reasons& reasons() {
  static auto* result = new Reasons;
  return *result;
}

}  // namespace

cudaError_t remember(cudaError_t error) {
  last_error = error;
  return error;
}

cudaError_t fail_launch(const std::string& reason) {
  {
    const std::lock_guard<std::mutex> lock(reasons().mutex);
    if (reasons().texts.empty() || reasons().texts.back() != reason) reasons().texts.push_back(reason);
  }
  if (settings().verbose) {
    const std::string line = "steadygrad: " + reason + "\n";
    std::fwrite(line.data(), 1, line.size(), stderr);
  }
  return remember(cudaErrorLaunchFailure);
}

}  // namespace steadygrad::emulation

using namespace steadygrad::emulation;

cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorName(cudaError_t error) {
  const Known* known = find(error);
  return known == nullptr ? "unrecognized error code" : known->name;
}

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) {
    const std::lock_guard<std::mutex> lock(reasons().mutex);
    if (!reasons().texts.empty()) return reasons().texts.back().c_str();
  }
  const Known* known = find(error);
  return known == nullptr ? "unrecognized error code" : known->text;
}
