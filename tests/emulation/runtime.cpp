#include "emulation/runtime.h"

#include <cstring>
#include <map>
#include <mutex>

#include "emulation/block.h"
#include "emulation/device.h"
#include "emulation/errors.h"

namespace steadygrad::emulation {
namespace {

constexpr int kCudaVersion = 13000;
constexpr int kMajor = 9;
constexpr int kMinor = 0;
constexpr int kThreadsPerMultiprocessor = 2048;

// The limit of dynamic shared memory for kernels that have asked for another than the usual one.
struct SharedMemoryLimits {
  std::mutex mutex;
  std::map<const void*, int> bytes;
};

SharedMemoryLimits& limits() {
  static auto* result = new SharedMemoryLimits;
  return *result;
}

}  // namespace
}  // namespace steadygrad::emulation

using namespace steadygrad::emulation;

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : remember(cudaErrorInvalidDevice); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return remember(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = kMaxThreads;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kSharedBytes;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = kWarpLanes;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors();
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = kL2Bytes;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = kThreadsPerMultiprocessor;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = kMajor;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = kMinor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = kSharedBytesPerMultiprocessor;
      return cudaSuccess;
    case cudaDevAttrSingleToDoublePrecisionPerfRatio:
      *value = static_cast<int>(fp64_ratio());
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kSharedBytesOnRequest;
      return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device != 0) return remember(cudaErrorInvalidDevice);
  *properties = {};
  std::strcpy(properties->name, "emulated");
  properties->totalGlobalMem = kMemoryBytes;
  properties->sharedMemPerBlock = kSharedBytes;
  properties->sharedMemPerBlockOptin = kSharedBytesOnRequest;
  properties->warpSize = kWarpLanes;
  properties->maxThreadsPerBlock = kMaxThreads;
  properties->maxThreadsPerMultiProcessor = kThreadsPerMultiprocessor;
  properties->major = kMajor;
  properties->minor = kMinor;
  properties->multiProcessorCount = multiprocessors();
  properties->l2CacheSize = kL2Bytes;
  properties->cooperativeLaunch = 1;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = kCudaVersion;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kCudaVersion;
  return cudaSuccess;
}

// Launches and copies are over when they return.

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  if (bytes != 0) std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (bytes != 0) std::memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > kSharedBytesOnRequest) return remember(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> lock(limits().mutex);
  limits().bytes[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  *attributes = {};
  attributes->binaryVersion = 10 * kMajor + kMinor;
  attributes->maxThreadsPerBlock = kMaxThreads;
  const std::lock_guard<std::mutex> lock(limits().mutex);
  const auto limit = limits().bytes.find(kernel);
  attributes->maxDynamicSharedSizeBytes = limit == limits().bytes.end() ? kSharedBytes : limit->second;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads,
                                                          size_t shared_bytes) {
  if (threads <= 0 || threads > static_cast<int>(kMaxThreads)) return remember(cudaErrorInvalidValue);
  *blocks = resident_blocks(shared_bytes);
  return cudaSuccess;
}
