// Cooperative groups: the grid, the block, and tiles of a warp.
#pragma once

#include "emulation/synchronization.h"
#include "emulation/vector_types.h"
#include "emulation/warp_functions.h"

namespace cooperative_groups {

struct grid_group {
  void sync(steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) const {
    steadygrad::emulation::grid_barrier(at);
  }
  bool is_valid() const { return steadygrad::emulation::grid_is_cooperative(); }
  unsigned long long num_blocks() const { return steadygrad::emulation::grid_blocks(); }
  unsigned long long block_rank() const {
    return blockIdx.x + static_cast<unsigned long long>(gridDim.x) *
                            (blockIdx.y + static_cast<unsigned long long>(gridDim.y) * blockIdx.z);
  }
  unsigned long long num_threads() const { return num_blocks() * steadygrad::emulation::block_size(); }
  unsigned long long size() const { return num_threads(); }
  unsigned long long thread_rank() const {
    return block_rank() * steadygrad::emulation::block_size() + steadygrad::emulation::thread_rank();
  }
};

struct thread_block {
  void sync(steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) const {
    steadygrad::emulation::block_barrier(false, at);
  }
  unsigned thread_rank() const { return steadygrad::emulation::thread_rank(); }
  unsigned num_threads() const { return steadygrad::emulation::block_size(); }
  unsigned size() const { return num_threads(); }
  dim3 group_index() const { return blockIdx; }
  dim3 thread_index() const { return threadIdx; }
};

template <unsigned Size>
struct thread_block_tile {
  static_assert(Size >= 1 && Size <= 32 && (Size & (Size - 1)) == 0,
                "a tile has 1, 2, 4, 8, 16 or 32 threads");
  using Location = steadygrad::emulation::Location;

  static constexpr unsigned size() { return Size; }
  static constexpr unsigned num_threads() { return Size; }
  unsigned thread_rank() const { return steadygrad::emulation::thread_rank() % Size; }
  unsigned meta_group_rank() const { return steadygrad::emulation::thread_rank() / Size; }
  unsigned meta_group_size() const { return (steadygrad::emulation::block_size() + Size - 1) / Size; }

  void sync(Location at = Location::here()) const { __syncwarp(mask(), at); }
  template <class T>
  T shfl(T value, int source, Location at = Location::here()) const {
    return __shfl_sync(mask(), value, source, Size, at);
  }
  template <class T>
  T shfl_up(T value, unsigned delta, Location at = Location::here()) const {
    return __shfl_up_sync(mask(), value, delta, Size, at);
  }
  template <class T>
  T shfl_down(T value, unsigned delta, Location at = Location::here()) const {
    return __shfl_down_sync(mask(), value, delta, Size, at);
  }
  template <class T>
  T shfl_xor(T value, unsigned lanes, Location at = Location::here()) const {
    return __shfl_xor_sync(mask(), value, static_cast<int>(lanes), Size, at);
  }
  unsigned ballot(int predicate, Location at = Location::here()) const {
    return __ballot_sync(mask(), predicate, at) >> first_lane();
  }
  int any(int predicate, Location at = Location::here()) const { return __any_sync(mask(), predicate, at); }
  int all(int predicate, Location at = Location::here()) const { return __all_sync(mask(), predicate, at); }

 private:
  static unsigned first_lane() { return static_cast<unsigned>(steadygrad::emulation::lane()) & ~(Size - 1); }
  static unsigned mask() { return (Size == 32 ? ~0u : (1u << Size % 32) - 1) << first_lane(); }
};

inline grid_group this_grid() { return {}; }
inline thread_block this_thread_block() { return {}; }

template <unsigned Size>
thread_block_tile<Size> tiled_partition(const thread_block&) {
  return {};
}

template <class Group>
void sync(const Group& group, steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  group.sync(at);
}

}  // namespace cooperative_groups
