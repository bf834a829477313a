// Pass 2 of a step: the update rule on every element. One file per rule instantiates it, so that they compile
// side by side.
#pragma once

#include "core/rules/table.h"
#include "cuda/gradient.h"
#include "cuda/launch.h"
#include "cuda/unit_clip.h"

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

// One element after another, with what the rule, the clip and the proximal step are. Penalties are those of
// the parameter as it is stored; `value` is what it stands for. `index`: of the element in its tensor.
template <class T, class UpdateRule, class Transform>
struct ElementUpdate {
  using Rule = UpdateRule;

  Rule rule;
  Transform transform;
  T threshold;

  __device__ __forceinline__ void operator()(T& value, T param, T grad, T (&states)[kMaxStates],
                                             int64_t index) const {
    T transformed;
    if constexpr (std::is_same_v<Transform, UnitTransform<T>>) {
      transformed = transform(grad, param, index);
    } else {
      transformed = transform(grad, param);
    }
    rule(value, transformed, states[0], states[1], states[2]);
    if (threshold != T(0)) value = steadygrad::soft_threshold(value, threshold);
  }
};

template <class T, class Update>
__device__ __forceinline__ int32_t update_quads(const TensorOperands& tensor, const Chunk& chunk,
                                                const Update& update) {
  using Rule = typename Update::Rule;
  T* const params = static_cast<T*>(tensor.param.data) + chunk.begin;
  const T* const grads = static_cast<const T*>(tensor.grad.data) + chunk.begin;
  const int32_t quads = chunk.count / kQuad;
  for (int32_t q = threadIdx.x; q < quads; q += kChunkThreads) {
    T param[kQuad];
    T grad[kQuad];
    T states[kMaxStates][kQuad] = {};
    load_quad<T>(params + q * kQuad, param);
    load_quad<T>(grads + q * kQuad, grad);
#pragma unroll
    for (int s = 0; s < Rule::kStateCount; ++s) {
      load_quad<T>(static_cast<const T*>(tensor.states[s].data) + chunk.begin + q * kQuad, states[s]);
    }
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      T element_states[kMaxStates] = {states[0][k], states[1][k], states[2][k]};
      update(param[k], param[k], grad[k], element_states, chunk.begin + q * kQuad + k);
#pragma unroll
      for (int s = 0; s < Rule::kStateCount; ++s) states[s][k] = element_states[s];
    }
    store_quad<T>(params + q * kQuad, param);
#pragma unroll
    for (int s = 0; s < Rule::kStateCount; ++s) {
      store_quad<T>(static_cast<T*>(tensor.states[s].data) + chunk.begin + q * kQuad, states[s]);
    }
  }
  return quads * kQuad;
}

// The same where the operands' types differ or parameters are in half precision.
template <class Update>
__device__ __forceinline__ int32_t update_mixed_quads(const TensorOperands& tensor, const Chunk& chunk,
                                                      const ParamStorage& storage, const Update& update) {
  using Rule = typename Update::Rule;
  const bool has_extra = keeps_extra(storage.rounding);
  const int32_t quads = chunk.count / kQuad;
  for (int32_t q = threadIdx.x; q < quads; q += kChunkThreads) {
    const int64_t index = chunk.begin + q * kQuad;
    const RawQuad raw_param = load_raw(tensor.param, index);
    const RawQuad raw_grad = load_raw(tensor.grad, index);
    RawQuad raw_states[kMaxStates];
#pragma unroll
    for (int s = 0; s < Rule::kStateCount; ++s) raw_states[s] = load_raw(tensor.states[s], index);
    RawQuad raw_extra{};
    if (has_extra) raw_extra = load_raw(tensor.extra, index);

    float param[kQuad];
    float grad[kQuad];
    float extra[kQuad];
    float states[kMaxStates][kQuad] = {};
    convert(raw_param, tensor.param.dtype, param);
    convert(raw_grad, tensor.grad.dtype, grad);
    convert(raw_extra, tensor.extra.dtype, extra);
#pragma unroll
    for (int s = 0; s < Rule::kStateCount; ++s) convert(raw_states[s], tensor.states[s].dtype, states[s]);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      float value = join(storage, param[k], extra[k]);
      float element_states[kMaxStates] = {states[0][k], states[1][k], states[2][k]};
      update(value, param[k], grad[k], element_states, index + k);
#pragma unroll
      for (int s = 0; s < Rule::kStateCount; ++s) states[s][k] = element_states[s];
      param[k] = split(storage, value, extra[k], static_cast<uint32_t>(q * kQuad + k));
    }
    store_quad(tensor.param, index, param);
#pragma unroll
    for (int s = 0; s < Rule::kStateCount; ++s) store_quad(tensor.states[s], index, states[s]);
    if (has_extra) store_quad(tensor.extra, index, extra);
  }
  return quads * kQuad;
}

// Whether `is_vector` holds for every operand of an update.
template <class Rule, class IsVector>
__device__ __forceinline__ bool all_operands(const TensorOperands& tensor, const ParamStorage& storage,
                                             IsVector is_vector) {
  bool all = is_vector(tensor.param) && is_vector(tensor.grad);
#pragma unroll
  for (int s = 0; s < Rule::kStateCount; ++s) all = all && is_vector(tensor.states[s]);
  return all && (!keeps_extra(storage.rounding) || is_vector(tensor.extra));
}

template <class Elements, class T, class Update>
__device__ __forceinline__ void update_chunk(const TensorOperands& tensor, const Chunk& chunk,
                                             const ParamStorage& storage, const Update& update) {
  using Rule = typename Update::Rule;
  // Whether the kernel meets half-precision parameters: no others have anything beside them.
  constexpr bool kHalf = Elements::kMixed && sizeof(T) == sizeof(float);
  int32_t done = 0;
  if constexpr (Elements::kMixed) {
    if (all_operands<Rule>(tensor, storage, is_direct<T>)) {
      done = update_quads<T>(tensor, chunk, update);
    } else if constexpr (kHalf) {
      if (all_operands<Rule>(tensor, storage, is_quad)) {
        done = update_mixed_quads(tensor, chunk, storage, update);
      }
    }
  } else {
    // Without the lambda the compiler takes four registers more for Adam.
    Elements::template with_direct<T>([&](auto) {
      done = update_quads<T>(tensor, chunk, update);
      return true;
    });
  }
  for (int32_t i = done + threadIdx.x; i < chunk.count; i += kChunkThreads) {
    const int64_t index = chunk.begin + i;
    const T param = Elements::template load<T>(tensor, tensor.param, index);
    const T grad = Elements::template load<T>(tensor, tensor.grad, index);
    T states[kMaxStates] = {};
#pragma unroll
    for (int s = 0; s < Rule::kStateCount; ++s) {
      states[s] = Elements::template load<T>(tensor, tensor.states[s], index);
    }
    T value = param;
    T extra = 0;
    if constexpr (kHalf) {
      if (keeps_extra(storage.rounding)) extra = Elements::template load<T>(tensor, tensor.extra, index);
      value = join(storage, param, extra);
    }
    update(value, param, grad, states, index);
    if constexpr (kHalf) value = split(storage, value, extra, static_cast<uint32_t>(i));
    Elements::template store<T>(tensor, tensor.param, index, value);
#pragma unroll
    for (int s = 0; s < Rule::kStateCount; ++s) {
      Elements::template store<T>(tensor, tensor.states[s], index, states[s]);
    }
    if constexpr (kHalf) {
      if (keeps_extra(storage.rounding)) Elements::template store<T>(tensor, tensor.extra, index, extra);
    }
  }
}

template <class Elements, class T, RuleKind kKind, bool kUnits>
__device__ __forceinline__ void update_tensor(const UpdateArguments& arguments, const TensorOperands& tensor,
                                              const Chunk& chunk) {
  const GroupOptions& group = arguments.source.groups[tensor.group];
  const auto transform = [&] {
    if constexpr (kUnits) {
      return arguments.source.template by_unit<T>(chunk, tensor.group);
    } else {
      return arguments.gradients_are_final ? GradientTransform<T>()
                                           : gradient_transform<T>(arguments.source.of(chunk, tensor.group));
    }
  }();
  const T threshold = static_cast<T>(proximal_threshold(group, arguments.source.options));
  const StepScalars scalars = arguments.scalars[chunk.tensor];
  ParamStorage storage;
  if constexpr (Elements::kMixed && sizeof(T) == sizeof(float)) {
    StepOptions options = arguments.source.options;
    options.rounded_steps = arguments.source.decision->rounded_steps;
    storage = param_storage(options, tensor, chunk);
  }
  with_rule<T>(kKind, group.hyper, scalars, [&](const auto& rule) __attribute__((always_inline)) {
    using Update = ElementUpdate<T, std::decay_t<decltype(rule)>, std::decay_t<decltype(transform)>>;
    update_chunk<Elements, T>(tensor, chunk, storage, Update{rule, transform, threshold});
  });
}

// kUnits: clipped by unit, in a kernel of its own, since that takes registers.
template <RuleKind kKind, class Elements, bool kUnits>
__global__ void __launch_bounds__(kChunkThreads, (kUnits ? 1 : 2) * Elements::kBlocks)
    update_kernel(const UpdateArguments __grid_constant__ arguments) {
  if (!arguments.source.proceeds()) return;
  const Chunk chunk = backward_chunk(arguments.table, static_cast<int32_t>(blockIdx.x));
  const TensorOperands tensor = arguments.table.tensor(chunk.tensor, arguments.grads);
  if (chunk.begin == 0 && threadIdx.x == 0) advance(arguments.table, chunk.tensor, arguments.taken);
  Elements::with_compute_type(tensor, [&](auto element) __attribute__((always_inline)) {
    update_tensor<Elements, decltype(element), kKind, kUnits>(arguments, tensor, chunk);
  });
}

template <RuleKind kKind>
void launch_update(const char* function, const UpdateArguments& arguments, Stream stream) {
  if (arguments.source.units != nullptr && !arguments.gradients_are_final) {
    return with_unit_contents(arguments.table.contents, [&](auto elements) {
      launch(function, stream, update_kernel<kKind, decltype(elements), true>, arguments.table.chunks,
             kChunkThreads, arguments);
    });
  }
  with_contents(arguments.table.contents, [&](auto elements) {
    launch(function, stream, update_kernel<kKind, decltype(elements), false>, arguments.table.chunks,
           kChunkThreads, arguments);
  });
}

}  // namespace steadygrad::cuda
