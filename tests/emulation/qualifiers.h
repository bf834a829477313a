// CUDA's qualifiers, as far as they mean something on the CPU.
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__
// A block runs on one OS thread, so what is local to the OS thread is local to the block.
#define __shared__ thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// `const Params __grid_constant__ params`: one object for the whole grid, as on the GPU, not a copy per
// thread.
#define __grid_constant__ &
