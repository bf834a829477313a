// Pass 2 of a step: the update rule on every element. One file per rule instantiates it, so that they compile
// side by side.
#pragma once

#include "core/rules/table.h"
#include "cuda/gradient.h"
#include "cuda/launch.h"

namespace steadygrad::cuda {

struct UpdateArguments {
  TensorTable table;
  void* const* grads;
  TransformSource source;
  const StepScalars* scalars;
  int32_t* taken;
  bool gradients_are_final;  // pass 2 of the gradients has written them
};

void update_sgd(const char* function, const UpdateArguments& arguments, Stream stream);
void update_adam(const char* function, const UpdateArguments& arguments, Stream stream);
void update_adagrad(const char* function, const UpdateArguments& arguments, Stream stream);
void update_rmsprop(const char* function, const UpdateArguments& arguments, Stream stream);

// One element after another, with what the rule, the clip and the proximal step are.
template <class T, class Rule>
struct ElementUpdate {
  Rule rule;
  GradientTransform<T> transform;
  T threshold;

  __device__ __forceinline__ void operator()(T& param, T grad, T (&states)[kMaxStates]) const {
    rule(param, transform(grad, param), states[0], states[1], states[2]);
    if (threshold != T(0)) param = steadygrad::soft_threshold(param, threshold);
  }
};

template <class T, class Element, class Rule>
__device__ __forceinline__ int32_t update_quads(const TensorOperands& tensor, const Chunk& chunk,
                                                const ElementUpdate<T, Rule>& update) {
  Element* const params = static_cast<Element*>(tensor.param.data) + chunk.begin;
  const Element* const grads = static_cast<const Element*>(tensor.grad.data) + chunk.begin;
  const int32_t quads = chunk.count / kQuad;
  for (int32_t q = threadIdx.x; q < quads; q += kChunkThreads) {
    T param[kQuad];
    T grad[kQuad];
    T states[kMaxStates][kQuad] = {};
    load_quad<T>(params + q * kQuad, param);
    load_quad<T>(grads + q * kQuad, grad);
#pragma unroll
    for (int s = 0; s < Rule::kStateCount; ++s) {
      load_quad<T>(static_cast<const Element*>(tensor.states[s].data) + chunk.begin + q * kQuad, states[s]);
    }
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      T element_states[kMaxStates] = {states[0][k], states[1][k], states[2][k]};
      update(param[k], grad[k], element_states);
#pragma unroll
      for (int s = 0; s < Rule::kStateCount; ++s) states[s][k] = element_states[s];
    }
    store_quad<T>(params + q * kQuad, param);
#pragma unroll
    for (int s = 0; s < Rule::kStateCount; ++s) {
      store_quad<T>(static_cast<Element*>(tensor.states[s].data) + chunk.begin + q * kQuad, states[s]);
    }
  }
  return quads * kQuad;
}

template <class Elements, class Element, class Rule>
__device__ __forceinline__ bool updates_direct(const TensorOperands& tensor) {
  bool direct =
      Elements::template direct<Element>(tensor.param) && Elements::template direct<Element>(tensor.grad);
#pragma unroll
  for (int s = 0; s < Rule::kStateCount; ++s) {
    direct = direct && Elements::template direct<Element>(tensor.states[s]);
  }
  return direct;
}

template <class Elements, class T, class Rule>
__device__ __forceinline__ void update_chunk(const TensorOperands& tensor, const Chunk& chunk,
                                             const ElementUpdate<T, Rule>& update) {
  int32_t done = 0;
  Elements::template with_direct<T>([&](auto element) {
    using Element = decltype(element);
    if (!updates_direct<Elements, Element, Rule>(tensor)) return false;
    done = update_quads<T, Element>(tensor, chunk, update);
    return true;
  });
  for (int32_t i = done + threadIdx.x; i < chunk.count; i += kChunkThreads) {
    const int64_t index = chunk.begin + i;
    T param = Elements::template load<T>(tensor, tensor.param, index);
    const T grad = Elements::template load<T>(tensor, tensor.grad, index);
    T states[kMaxStates] = {};
#pragma unroll
    for (int s = 0; s < Rule::kStateCount; ++s) {
      states[s] = Elements::template load<T>(tensor, tensor.states[s], index);
    }
    update(param, grad, states);
    Elements::template store<T>(tensor, tensor.param, index, param);
#pragma unroll
    for (int s = 0; s < Rule::kStateCount; ++s) {
      Elements::template store<T>(tensor, tensor.states[s], index, states[s]);
    }
  }
}

template <class Elements, class T, RuleKind kKind>
__device__ __forceinline__ void update_tensor(const UpdateArguments& arguments, const TensorOperands& tensor,
                                              const Chunk& chunk) {
  const GroupOptions& group = arguments.source.groups[tensor.group];
  const GradientTransform<T> transform =
      arguments.gradients_are_final ? GradientTransform<T>()
                                    : gradient_transform<T>(arguments.source.of(chunk, tensor.group));
  const T threshold = static_cast<T>(proximal_threshold(group, arguments.source.options));
  const StepScalars scalars = arguments.scalars[chunk.tensor];
  with_rule<T>(kKind, group.hyper, scalars, [&](const auto& rule) __attribute__((always_inline)) {
    update_chunk<Elements>(tensor, chunk,
                           ElementUpdate<T, std::decay_t<decltype(rule)>>{rule, transform, threshold});
  });
}

template <RuleKind kKind, class Elements>
__global__ void __launch_bounds__(kChunkThreads, 2 * Elements::kBlocks)
    update_kernel(const UpdateArguments __grid_constant__ arguments) {
  if (!arguments.source.proceeds()) return;
  const Chunk chunk = backward_chunk(arguments.table, static_cast<int32_t>(blockIdx.x));
  const TensorOperands tensor = arguments.table.tensor(chunk.tensor, arguments.grads);
  if (chunk.begin == 0 && threadIdx.x == 0) advance(arguments.table, chunk.tensor, arguments.taken);
  Elements::with_compute_type(tensor, [&](auto element) __attribute__((always_inline)) {
    update_tensor<Elements, decltype(element), kKind>(arguments, tensor, chunk);
  });
}

template <RuleKind kKind>
void launch_update(const char* function, const UpdateArguments& arguments, Stream stream) {
  with_contents(arguments.table.contents, [&](auto elements) {
    launch(function, stream, update_kernel<kKind, decltype(elements)>, arguments.table.chunks, kChunkThreads,
           arguments);
  });
}

}  // namespace steadygrad::cuda
