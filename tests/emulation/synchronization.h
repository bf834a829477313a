// Barriers and fences.
#pragma once

#include "emulation/execution.h"

inline void __syncthreads(steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  steadygrad::emulation::block_barrier(false, at);
}

inline int __syncthreads_or(int predicate,
                            steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  return steadygrad::emulation::block_barrier(predicate != 0, at).any;
}

inline int __syncthreads_and(int predicate,
                             steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  return steadygrad::emulation::block_barrier(predicate != 0, at).all;
}

inline int __syncthreads_count(int predicate,
                               steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  return steadygrad::emulation::block_barrier(predicate != 0, at).count;
}

inline void __syncwarp(unsigned mask = ~0u,
                       steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  using namespace steadygrad::emulation;
  warp_rendezvous(mask & live_lanes(), {WarpOperation::synchronize}, at);
}

// Returns the lanes that have not exited, whichever branch they are in; this is an approximation.
inline unsigned __activemask() { return steadygrad::emulation::live_lanes(); }

inline void __threadfence_block() { steadygrad::emulation::memory_fence(); }
inline void __threadfence() { steadygrad::emulation::memory_fence(); }
inline void __threadfence_system() { steadygrad::emulation::memory_fence(); }

inline void __nanosleep(unsigned) { steadygrad::emulation::yield_thread(); }

inline void __trap(steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  steadygrad::emulation::trap(at);
}
