// How a tensor is dealt to blocks and threads. A block takes a group of channels, and of the elements of
// these an equal part of the batch.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

#include "core/backend.h"
#include "core/batch_norm.h"
#include "cuda/batch_norm/units.h"

namespace steadygrad::cuda {

constexpr int kTileThreads = 256;
constexpr int kWidestGroup = 32;  // units of columns; 512 bytes of fp16 are enough for memory and caches

// How many units of each tensor a thread loads at once where it reads two tensors.
template <class Access>
constexpr int kPairsAtOnce = Access::kAtOnce > 1 ? Access::kAtOnce / 2 : 1;

// Channels that are neighbours in memory are columns: each of a thread's lanes has a channel of its own, and
// an item is a row. Else a channel has planes, all lanes of a thread belong to one channel, and an item is a
// unit of a plane.
struct Tiles {
  BatchNormShape shape;
  DType dtype = DType::float32;
  bool columns = false;
  bool wide = false;   // whether units can be loaded 16 bytes at a time
  int32_t width = 1;   // of a group: units of columns, or channels with planes
  int32_t depth = 1;   // threads that share a unit of columns, or a channel
  int32_t splits = 1;  // blocks that share a group
  int32_t groups = 1;
  int64_t slots = 1;  // units that a plane can lie across
  int64_t items = 0;
  int64_t items_per_block = 0;
  int64_t depth_planes = 0;  // depth = depth_planes * slots + depth_slots
  int64_t depth_slots = 0;

  STEADYGRAD_INLINE int64_t numel() const { return shape.outer * shape.channels * shape.inner; }
  STEADYGRAD_INLINE int32_t group_channels() const { return columns ? width * kUnit : width; }
  STEADYGRAD_INLINE int64_t blocks() const { return static_cast<int64_t>(groups) * splits; }
};

// A thread's way through the items that its block has of a group.
template <bool kColumns, bool kAligned>
class Cursor {
 public:
  __device__ __forceinline__ Cursor(const Tiles& tiles, int64_t group, int64_t split, int thread)
      : tiles_(tiles) {
    if constexpr (kColumns) {
      y_ = thread / tiles.width;
      x_ = thread - y_ * tiles.width;
    } else {
      x_ = thread / tiles.depth;
      y_ = thread - x_ * tiles.depth;
    }
    channel_ = group * tiles.group_channels() + (kColumns ? x_ * kUnit : x_);
    const int64_t begin = split * tiles.items_per_block + y_;
    const int64_t left = tiles.items - split * tiles.items_per_block;
    const int64_t items = (left < tiles.items_per_block ? left : tiles.items_per_block) - y_;
    const bool active = kColumns ? y_ < tiles.depth : x_ < tiles.width;
    first_ = begin;
    count_ = active && items > 0 && channel_ < tiles.shape.channels
                 ? static_cast<int>((items + tiles.depth - 1) / tiles.depth)
                 : 0;
  }

  __device__ __forceinline__ int x() const { return x_; }
  __device__ __forceinline__ int y() const { return y_; }
  __device__ __forceinline__ int64_t channel() const { return channel_; }  // of lane 0
  __device__ __forceinline__ int count() const { return count_; }

  // Goes to item k of this thread.
  __device__ __forceinline__ void seek(int64_t k) {
    const int64_t item = first_ + k * tiles_.depth;
    if constexpr (kColumns) {
      plane_ = item;
    } else {
      plane_ = item / tiles_.slots;
      slot_ = item - plane_ * tiles_.slots;
    }
  }

  __device__ __forceinline__ void advance() {
    if constexpr (kColumns) {
      plane_ += tiles_.depth;
    } else {
      plane_ += tiles_.depth_planes;
      slot_ += tiles_.depth_slots;
      if (slot_ >= tiles_.slots) {
        slot_ -= tiles_.slots;
        ++plane_;
      }
    }
  }

  __device__ __forceinline__ void retreat() {
    if constexpr (kColumns) {
      plane_ -= tiles_.depth;
    } else {
      plane_ -= tiles_.depth_planes;
      slot_ -= tiles_.depth_slots;
      if (slot_ < 0) {
        slot_ += tiles_.slots;
        --plane_;
      }
    }
  }

  // Where the item lies, and its byte of the mask. Wide units have a mask only where a row of it is whole
  // bytes.
  __device__ __forceinline__ Place place(bool exists) const {
    const BatchNormShape& shape = tiles_.shape;
    const int64_t row = kColumns ? plane_ : plane_ * shape.channels + channel_;
    Place place;
    if constexpr (kColumns) {
      place.offset = plane_ * shape.channels + channel_;
      place.lanes = kAligned ? kAllLanes : lanes_between(0, shape.channels - channel_);
    } else {
      const int64_t begin = row * shape.inner;
      place.offset = (kAligned ? begin / kUnit * kUnit : begin) + slot_ * kUnit;
      place.lanes = lanes_between(begin - place.offset, begin + shape.inner - place.offset);
    }
    if (!exists) place.lanes = 0;
    if constexpr (kAligned) {
      place.mask_byte = place.offset / kUnit;
    } else {
      place.mask_byte = row * shape.mask_row_bytes() + (kColumns ? channel_ / kUnit : slot_);
    }
    return place;
  }

 private:
  const Tiles& tiles_;
  int x_;
  int y_;
  int64_t channel_;
  int64_t first_;
  int count_;
  int64_t plane_ = 0;
  int64_t slot_ = 0;
};

// Whether all of these begin at a multiple of 16 bytes, or are null.
template <class... Pointers>
bool are_aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % sizeof(uint4) == 0) && ...);
}

// With `has_mask` a byte of the mask has to hold the bits of one unit, which limits how units may lie.
Tiles tiles_for(const char* function, const BatchNormShape& shape, DType dtype, bool aligned, bool has_mask,
                Stream stream);

// Calls function(Access{}, columns) with the access and the layout that the tiles need, on the host.
template <class Access, class Function>
void with_layout(const Tiles& tiles, Function function) {
  if (tiles.columns) {
    function(Access(), std::true_type());
  } else {
    function(Access(), std::false_type());
  }
}

template <class Function>
void with_wide_access(const Tiles& tiles, Function function) {
  switch (tiles.dtype) {
    case DType::float32:
      return with_layout<Wide<float>>(tiles, function);
    case DType::float64:
      return with_layout<Wide<double>>(tiles, function);
    case DType::bfloat16:
      return with_layout<Wide<BFloat16>>(tiles, function);
    case DType::float16:
      return with_layout<Wide<Float16>>(tiles, function);
  }
}

template <class Function>
void with_access(const Tiles& tiles, Function function) {
  if (tiles.wide) return with_wide_access(tiles, function);
  if (tiles.dtype == DType::float64) return with_layout<Narrow<double>>(tiles, function);
  with_layout<Narrow<float>>(tiles, function);
}

}  // namespace steadygrad::cuda
