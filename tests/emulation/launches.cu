// What a launch does to the process that makes it: `launches errors|threads|variables|fork`, each prints its
// findings, a line each.
#include <cstdio>
#include <cstring>
#include <cuda_runtime.h>
#include <filesystem>
#include <iterator>
#include <sys/wait.h>
#include <unistd.h>

#include "emulation/launches.h"

namespace {

__global__ void fill_kernel(int* out, int value) {
  __shared__ int shared;
  if (threadIdx.x == 0) shared = value;
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = shared;
}

__global__ void trap_kernel(int block) {
  if (static_cast<int>(blockIdx.x) == block && threadIdx.x == 5) __trap();
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes,
                   bool cooperative, Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative ? 1 : 0;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

int buffer[64 * 256];

bool fills(unsigned blocks, unsigned threads, int value) {
  if (launch(fill_kernel, blocks, threads, 0, false, buffer, value) != cudaSuccess) return false;
  for (unsigned i = 0; i < blocks * threads; ++i) {
    if (buffer[i] != value) return false;
  }
  return true;
}

void print(const char* what, cudaError_t error) { std::printf("%s: %s\n", what, cudaGetErrorName(error)); }

void print_count(const char* what, long count) { std::printf("%s: %ld\n", what, count); }

void errors() {
  constexpr int kTooMuch = 48 * 1024 + 16;
  const auto fill = [](dim3 blocks, dim3 threads, size_t shared_bytes, bool cooperative) {
    return launch(fill_kernel, blocks, threads, shared_bytes, cooperative, buffer, 1);
  };
  print("no threads", fill(1, 0, 0, false));
  print("no blocks", fill(0, 32, 0, false));
  print("1025 threads", fill(1, 1025, 0, false));
  print("32 x 33 threads", fill(1, dim3(32, 33), 0, false));
  print("65 threads in z", fill(1, dim3(1, 1, 65), 0, false));
  print("65536 blocks in y", fill(dim3(1, 65536), 32, 0, false));
  print("shared memory without asking", fill(1, 32, kTooMuch, false));
  print("asked for too much",
        cudaFuncSetAttribute(fill_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 20));
  print("kept", cudaGetLastError());
  print("asked", cudaFuncSetAttribute(fill_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kTooMuch));
  print("shared memory after asking", fill(1, 32, kTooMuch, false));

  int multiprocessors = 0;
  int blocks = 0;
  print("attribute", cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  print("occupancy", cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, fill_kernel, 256, 0));
  const auto resident = static_cast<unsigned>(multiprocessors * blocks);
  print("cooperative", fill(resident, 32, 0, true));
  print("cooperative, one block more", fill(resident + 1, 32, 0, true));
  print("not cooperative, one block more", fill(resident + 1, 32, 0, false));
  print("other device", cudaSetDevice(1));
  print("kept", cudaPeekAtLastError());
  print("taken", cudaGetLastError());
  print("after that", cudaGetLastError());
  print("trap", launch(trap_kernel, 4, 32, 0, false, 2));
  std::printf("reason: %s\n", cudaGetErrorString(cudaGetLastError()));
  print("launch after a failed one", fill(4, 32, 0, false));
  print_count("launches", static_cast<long>(steadygrad::emulation::launch_count()));
}

long threads_of_process() {
  const std::filesystem::directory_iterator tasks("/proc/self/task");
  return std::distance(begin(tasks), end(tasks));
}

void threads() {
  print_count("before", threads_of_process());
  fills(8, 64, 1);
  const long first = threads_of_process();
  for (int i = 0; i < 50; ++i) fills(8, 64, i);
  print_count("started later", threads_of_process() - first);
}

// Zero-initialised, so it lies where shared variables do.
thread_local int of_the_caller;

void variables() {
  for (int i = 0; i < 20; ++i) fills(8, 64, i);
  print_count("variable", of_the_caller);
}

void fork_and_launch() {
  print_count("before", fills(8, 64, 1));
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) _exit(fills(8, 64, 2) && fills(8, 64, 3) ? 0 : 1);
  int status = -1;
  waitpid(child, &status, 0);
  print_count("child", status);
  print_count("after", fills(8, 64, 4));
}

}  // namespace

int main(int count, char** arguments) {
  const char* part = count == 2 ? arguments[1] : "";
  if (std::strcmp(part, "errors") == 0) errors();
  if (std::strcmp(part, "threads") == 0) threads();
  if (std::strcmp(part, "variables") == 0) variables();
  if (std::strcmp(part, "fork") == 0) fork_and_launch();
  return 0;
}
