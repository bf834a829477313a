// The tensors of a call in device memory: the table every kernel finds its piece of work in.
#pragma once

#include <cstdint>
#include <vector>

#include "core/backend.h"
#include "core/step.h"
#include "core/tensors.h"
#include "cuda/elements.h"

namespace steadygrad::cuda {

enum Role { kParam, kGrad, kFirstState, kExtra = kFirstState + kMaxStates, kRoles };

struct TensorHead {
  int64_t numel;
  const int64_t* sizes;
  int32_t ndim;
  int32_t group;
  int32_t first_chunk;
  int32_t slot;
};

// Pointers into device memory. Arrays have one entry per tensor, unless something else is said.
struct TensorTable {
  int32_t tensors = 0;
  int32_t chunks = 0;
  int32_t nonempty_tensors = 0;
  int32_t groups = 0;
  Contents contents = Contents::float32_contiguous;
  const TensorHead* heads = nullptr;
  const Operand* operands[kRoles] = {};  // null where no tensor has that operand
  const int32_t* nonempty = nullptr;     // the tensors that have elements
  const int32_t* group_begin = nullptr;  // per group and one more: where it begins in `nonempty`
  const StepCounter* counters = nullptr;
  // Two, both 0 between steps: blocks of a reduction that are done, and whether a unit is clipped.
  uint32_t* arrived = nullptr;

  // The tensor that a chunk belongs to: the last one that begins no later.
  STEADYGRAD_INLINE int32_t tensor_of(int32_t chunk) const {
    int32_t low = 0;
    int32_t high = tensors;
    while (high - low > 1) {
      const int32_t middle = (low + high) / 2;
      if (heads[middle].first_chunk <= chunk) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // `grads` replaces the gradients' addresses, unless it is null.
  STEADYGRAD_INLINE TensorOperands tensor(int32_t index, void* const* grads) const {
    const TensorHead head = heads[index];
    TensorOperands tensor;
    tensor.numel = head.numel;
    tensor.sizes = head.sizes;
    tensor.ndim = head.ndim;
    tensor.group = head.group;
    tensor.place = head.slot;
    if (operands[kParam] != nullptr) tensor.param = operands[kParam][index];
    if (operands[kGrad] != nullptr) tensor.grad = operands[kGrad][index];
    if (grads != nullptr) tensor.grad.data = grads[index];
    for (int s = 0; s < kMaxStates; ++s) {
      if (operands[kFirstState + s] != nullptr) tensor.states[s] = operands[kFirstState + s][index];
    }
    if (operands[kExtra] != nullptr) tensor.extra = operands[kExtra][index];
    return tensor;
  }

  STEADYGRAD_INLINE Chunk chunk(int32_t index) const {
    const int32_t tensor = tensor_of(index);
    const TensorHead head = heads[tensor];
    const int64_t begin = (index - head.first_chunk) * kChunk;
    const int64_t left = head.numel - begin;
    return {tensor, static_cast<int32_t>(left < kChunk ? left : kChunk), begin};
  }
};

// Hands out pieces of one block of device memory. With a null base it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <class T>
  T* take(int64_t count) {
    const int64_t begin = used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(base_ + begin);
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kAlignment = 16;
  uintptr_t base_;
  int64_t used_ = 0;
};

// Allocates what lay_out(arena) takes, which is called twice: to measure, and with the memory, whose address
// is returned.
template <class LayOut>
void* allocate_arena(const Allocate& allocate, LayOut lay_out) {
  Arena measured(nullptr);
  lay_out(measured);
  void* const base = allocate(measured.used());
  Arena arena(base);
  lay_out(arena);
  return base;
}

// What only a step has to say about its tensors.
struct StepEntries {
  const std::vector<StepCounter>* counters = nullptr;
  bool is_step = false;
};

// Builds the table of `tensors` as it will stand at the arena's next address; `image` gets its words.
TensorTable build_table(const Tensors& tensors, int32_t groups, const StepEntries& step, Arena& arena,
                        std::vector<uint64_t>& image);

// Which kernels take these tensors.
Contents contents_of(const Tensors& tensors);

// For operations that need nothing else on the device.
TensorTable upload_table(const char* function, const Tensors& tensors, const Allocate& allocate,
                         Stream stream);

// Copies the words to the device as kernel arguments, which needs no pinned memory and can be captured.
void upload(const char* function, const std::vector<uint64_t>& image, void* to, Stream stream);

}  // namespace steadygrad::cuda
