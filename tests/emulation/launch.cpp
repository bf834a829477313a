#include "emulation/launch.h"

#include <atomic>
#include <cstdio>
#include <string>

#include "emulation/block.h"
#include "emulation/device.h"
#include "emulation/errors.h"
#include "emulation/launches.h"
#include "emulation/settings.h"
#include "emulation/workers.h"

namespace steadygrad::emulation {
namespace {

std::atomic<uint64_t> launches_begun{0};
std::atomic<uint64_t> launches_done{0};

bool is_cooperative(const cudaLaunchConfig_t& config) {
  bool cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeCooperative)
      cooperative = config.attrs[i].val.cooperative != 0;
  }
  return cooperative;
}

// What the runtime refuses before anything runs.
cudaError_t check(const Grid& grid, const void* kernel) {
  constexpr unsigned kMaxBlocks = 65535;  // in y and z
  constexpr unsigned kMaxBlocksInX = 2147483647;
  constexpr unsigned kMaxThreadsInZ = 64;
  const uint64_t threads = uint64_t{grid.threads.x} * grid.threads.y * grid.threads.z;
  if (threads == 0 || grid.threads.x > kMaxThreads || grid.threads.y > kMaxThreads ||
      grid.threads.z > kMaxThreadsInZ || threads > kMaxThreads || grid.block_count == 0 ||
      grid.blocks.x > kMaxBlocksInX || grid.blocks.y > kMaxBlocks || grid.blocks.z > kMaxBlocks) {
    return cudaErrorInvalidConfiguration;
  }
  cudaFuncAttributes attributes;
  cudaFuncGetAttributes(&attributes, kernel);
  if (grid.shared_bytes > static_cast<size_t>(attributes.maxDynamicSharedSizeBytes))
    return cudaErrorInvalidValue;
  if (!grid.cooperative) return cudaSuccess;
  const uint64_t resident = cooperative_multiprocessors() * resident_blocks(grid.shared_bytes);
  return grid.block_count > resident ? cudaErrorCooperativeLaunchTooLarge : cudaSuccess;
}

}  // namespace

uint64_t launch_count() { return launches_done; }

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*invoke)(const void*),
                   const void* arguments) {
  Grid grid;
  grid.invoke = invoke;
  grid.arguments = arguments;
  grid.blocks = config.gridDim;
  grid.threads = config.blockDim;
  grid.shared_bytes = config.dynamicSmemBytes;
  grid.cooperative = is_cooperative(config);
  grid.block_count = uint64_t{grid.blocks.x} * grid.blocks.y * grid.blocks.z;
  const cudaError_t refused = check(grid, kernel);
  if (refused != cudaSuccess) return remember(refused);
  if (!settings().problem.empty()) return fail_launch(settings().problem);

  grid.thread_count = grid.threads.x * grid.threads.y * grid.threads.z;
  grid.live = grid.block_count;
  grid.launch = launches_begun++;
  grid.order = settings().order;
  grid.seed = settings().seed * 1000003 + grid.launch;
  if (!run_grid(grid)) return remember(cudaErrorLaunchOutOfResources);
  if (grid.failed) return fail_launch(grid.message);
  ++launches_done;
  return cudaSuccess;
}

}  // namespace steadygrad::emulation
