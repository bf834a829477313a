// Marks arithmetic that host and device code share. It is always inlined: the CPU backend compiles it once
// per instruction set, and an out-of-line copy for one set must never be linked into another.
#pragma once

#if defined(__CUDACC__)
#define STEADYGRAD_INLINE __host__ __device__ __forceinline__
#else
#define STEADYGRAD_INLINE inline __attribute__((always_inline))
#endif
