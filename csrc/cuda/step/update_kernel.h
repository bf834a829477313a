// The kernel of pass 2, which the file of each rule instantiates.
#pragma once

#include "cuda/launch.h"
#include "cuda/step/update.h"

namespace steadygrad::cuda {

template <class T>
__device__ __forceinline__ T transformed(const GradientTransform<T>& transform, T grad, T param, int64_t) {
  return transform(grad, param);
}
template <class T>
__device__ __forceinline__ T transformed(const UnitTransform<T>& transform, T grad, T param, int64_t index) {
  return transform(grad, param, index);
}

// Updates tensors that are fp32, contiguous and aligned, four elements at a time.
template <class Rule, class Transform>
struct DirectUpdate {
  Rule rule;
  Transform transform;
  float threshold;

  __device__ __forceinline__ void operator()(float& param, float grad, float (&states)[kMaxStates],
                                             int64_t index) const {
    grad = transformed(transform, grad, param, index);
    rule(param, grad, states[0], states[1], states[2]);
    if (threshold != 0) param = steadygrad::soft_threshold(param, threshold);
  }

  __device__ __forceinline__ int32_t update_quads(const TensorOperands& tensor, const Chunk& chunk) const {
    float* const params = static_cast<float*>(tensor.param.data) + chunk.begin;
    const float* const grads = static_cast<const float*>(tensor.grad.data) + chunk.begin;
    const int32_t quads = chunk.count / kQuad;
    for (int32_t q = threadIdx.x; q < quads; q += kChunkThreads) {
      float param[kQuad];
      float grad[kQuad];
      float states[kMaxStates][kQuad] = {};
      load_quad<float>(params + q * kQuad, param);
      load_quad<float>(grads + q * kQuad, grad);
#pragma unroll
      for (int s = 0; s < Rule::kStateCount; ++s) {
        load_quad<float>(static_cast<const float*>(tensor.states[s].data) + chunk.begin + q * kQuad,
                         states[s]);
      }
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        float element_states[kMaxStates] = {states[0][k], states[1][k], states[2][k]};
        (*this)(param[k], grad[k], element_states, chunk.begin + q * kQuad + k);
#pragma unroll
        for (int s = 0; s < Rule::kStateCount; ++s) states[s][k] = element_states[s];
      }
      store_quad<float>(params + q * kQuad, param);
#pragma unroll
      for (int s = 0; s < Rule::kStateCount; ++s) {
        store_quad<float>(static_cast<float*>(tensor.states[s].data) + chunk.begin + q * kQuad, states[s]);
      }
    }
    return quads * kQuad;
  }

  __device__ __forceinline__ void update(const TensorOperands& tensor, const Chunk& chunk) const {
    const int32_t done = update_quads(tensor, chunk);
    for (int32_t i = done + threadIdx.x; i < chunk.count; i += kChunkThreads) {
      const int64_t index = chunk.begin + i;
      float param = static_cast<const float*>(tensor.param.data)[index];
      const float grad = static_cast<const float*>(tensor.grad.data)[index];
      float states[kMaxStates] = {};
#pragma unroll
      for (int s = 0; s < Rule::kStateCount; ++s) {
        states[s] = static_cast<const float*>(tensor.states[s].data)[index];
      }
      (*this)(param, grad, states, index);
      static_cast<float*>(tensor.param.data)[index] = param;
#pragma unroll
      for (int s = 0; s < Rule::kStateCount; ++s)
        static_cast<float*>(tensor.states[s].data)[index] = states[s];
    }
  }
};

// Elements of one parameter that are updated together, in the type they are computed in.
template <class T, int kCount>
struct Updated {
  T param[kCount];
  T grad[kCount];
  T states[kMaxStates][kCount] = {};
  T extra[kCount] = {};
};

// Updates tensors of any types and layouts. Loads, conversions and stores are compiled once for all terms of
// a rule, and a branch that is the same for the whole block chooses the terms: a copy of everything for each
// of up to eight variants took minutes to compile.
template <class Elements, class T, class Named, class Transform>
struct MixedUpdate {
  using Rule = typename Named::template Full<T>;
  // Whether half-precision parameters occur: no others have anything beside them.
  static constexpr bool kHalf = std::is_same_v<T, float>;

  Rule rule;
  RuleTerms terms;
  int states;
  Transform transform;
  T threshold;
  ParamStorage storage;

  // Penalties are those of the parameter as it is stored; the rule takes the value that it stands for.
  // `place`: of the first element in the chunk.
  template <int kCount>
  __device__ __forceinline__ void operator()(Updated<T, kCount>& elements, int64_t index,
                                             uint32_t place) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      elements.grad[k] = transformed(transform, elements.grad[k], elements.param[k], index + k);
    }
    join(elements);
    with_rule_type<T, Named>(terms, [&](auto type) __attribute__((always_inline)) {
      const auto chosen = bit_cast<typename decltype(type)::type>(rule);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        chosen(elements.param[k], elements.grad[k], elements.states[0][k], elements.states[1][k],
               elements.states[2][k]);
      }
    });
    if (threshold != T(0)) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        elements.param[k] = steadygrad::soft_threshold(elements.param[k], threshold);
      }
    }
    split(elements, place);
  }

  template <int kCount>
  __device__ __forceinline__ void join(Updated<T, kCount>& elements) const {
    if constexpr (kHalf) {
      if (!keeps_extra(storage.rounding)) return;
      with_storage(storage.rounding, storage.dtype, [&](auto rounding, auto element) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          elements.param[k] =
              joined<decltype(rounding)::value, decltype(element)>(elements.param[k], elements.extra[k]);
        }
      });
    }
  }

  template <int kCount>
  __device__ __forceinline__ void split(Updated<T, kCount>& elements, uint32_t place) const {
    if constexpr (kHalf) {
      if (storage.rounding == Rounding::nearest) return;  // rounded as it is stored
      with_storage(storage.rounding, storage.dtype, [&](auto rounding, auto element) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          elements.param[k] = steadygrad::split<decltype(rounding)::value, decltype(element)>(
              elements.param[k], elements.extra[k], random_bits(storage.random, place + k));
        }
      });
    }
  }

  // Whether `is_vector` holds for every operand.
  template <class IsVector>
  __device__ __forceinline__ bool all_operands(const TensorOperands& tensor, IsVector is_vector) const {
    bool all = is_vector(tensor.param) && is_vector(tensor.grad);
#pragma unroll
    for (int s = 0; s < Rule::kStateCount; ++s) all = all && (s >= states || is_vector(tensor.states[s]));
    return all && (!keeps_extra(storage.rounding) || is_vector(tensor.extra));
  }

  __device__ __forceinline__ int32_t update_quads(const TensorOperands& tensor, const Chunk& chunk) const {
    const bool has_extra = keeps_extra(storage.rounding);
    const int32_t quads = chunk.count / kQuad;
    for (int32_t q = threadIdx.x; q < quads; q += kChunkThreads) {
      const int64_t index = chunk.begin + q * kQuad;
      const RawQuad raw_param = load_raw(tensor.param, index);
      const RawQuad raw_grad = load_raw(tensor.grad, index);
      RawQuad raw_states[kMaxStates] = {};
#pragma unroll
      for (int s = 0; s < Rule::kStateCount; ++s) {
        if (s < states) raw_states[s] = load_raw(tensor.states[s], index);
      }
      RawQuad raw_extra{};
      if (has_extra) raw_extra = load_raw(tensor.extra, index);

      Updated<float, kQuad> elements;
      convert(raw_param, tensor.param.dtype, elements.param);
      convert(raw_grad, tensor.grad.dtype, elements.grad);
      convert(raw_extra, tensor.extra.dtype, elements.extra);
#pragma unroll
      for (int s = 0; s < Rule::kStateCount; ++s) {
        convert(raw_states[s], tensor.states[s].dtype, elements.states[s]);
      }
      (*this)(elements, index, static_cast<uint32_t>(q * kQuad));
      store_quad(tensor.param, index, elements.param);
#pragma unroll
      for (int s = 0; s < Rule::kStateCount; ++s) {
        if (s < states) store_quad(tensor.states[s], index, elements.states[s]);
      }
      if (has_extra) store_quad(tensor.extra, index, elements.extra);
    }
    return quads * kQuad;
  }

  __device__ __forceinline__ void update(const TensorOperands& tensor, const Chunk& chunk) const {
    const bool has_extra = kHalf && keeps_extra(storage.rounding);
    int32_t done = 0;
    if constexpr (std::is_same_v<T, float>) {
      if (all_operands(tensor, is_quad)) done = update_quads(tensor, chunk);
    }
#pragma unroll 1
    for (int32_t i = done + threadIdx.x; i < chunk.count; i += kChunkThreads) {
      const int64_t index = chunk.begin + i;
      Updated<T, 1> elements;
      elements.param[0] = Elements::template load<T>(tensor, tensor.param, index);
      elements.grad[0] = Elements::template load<T>(tensor, tensor.grad, index);
#pragma unroll
      for (int s = 0; s < Rule::kStateCount; ++s) {
        if (s < states) elements.states[s][0] = Elements::template load<T>(tensor, tensor.states[s], index);
      }
      if (has_extra) elements.extra[0] = Elements::template load<T>(tensor, tensor.extra, index);
      (*this)(elements, index, static_cast<uint32_t>(i));
      Elements::template store<T>(tensor, tensor.param, index, elements.param[0]);
#pragma unroll
      for (int s = 0; s < Rule::kStateCount; ++s) {
        if (s < states) Elements::template store<T>(tensor, tensor.states[s], index, elements.states[s][0]);
      }
      if (has_extra) Elements::template store<T>(tensor, tensor.extra, index, elements.extra[0]);
    }
  }
};

template <class Elements, class T, class Named, bool kUnits>
__device__ __forceinline__ void update_tensor(const UpdateArguments& arguments, const TensorOperands& tensor,
                                              const Chunk& chunk) {
  const TransformSource& source = arguments.source;
  const auto transform = [&] {
    if constexpr (kUnits) {
      return source.by_unit<T>(chunk, tensor.group);
    } else {
      return arguments.gradients_are_final ? GradientTransform<T>()
                                           : gradient_transform<T>(source.of(chunk, tensor.group));
    }
  }();
  using Transform = std::decay_t<decltype(transform)>;
  const GroupOptions& group = source.groups[tensor.group];
  const RuleHyper& hyper = group.hyper;
  const T threshold = static_cast<T>(proximal_threshold(group, source.options));
  const StepScalars scalars = arguments.scalars[chunk.tensor];
  if constexpr (Elements::kMixed) {
    ParamStorage storage;
    if constexpr (std::is_same_v<T, float>) {
      StepOptions options = source.options;
      options.rounded_steps = source.decision->rounded_steps;
      storage = param_storage(options, tensor, chunk);
    }
    using Rule = typename Named::template Full<T>;
    const MixedUpdate<Elements, T, Named, Transform> update{
        Rule(hyper, scalars), rule_terms(hyper), Named::state_count(hyper), transform, threshold, storage};
    update.update(tensor, chunk);
  } else {
    with_functor<T, Named>(hyper, scalars, [&](const auto& rule) __attribute__((always_inline)) {
      DirectUpdate<std::decay_t<decltype(rule)>, Transform>{rule, transform, threshold}.update(tensor, chunk);
    });
  }
}

// Blocks that a multiprocessor is to hold at least. With 7 (72 registers) fp32 has enough loads in flight.
template <class Elements, bool kUnits>
constexpr int kBlocksOfUpdate = kUnits             ? Elements::kBlocks
                                : Elements::kMixed ? 2 * Elements::kBlocks
                                                   : 7;

// kUnits: clipped by unit, in a kernel of its own, since that takes registers.
template <class Named, class Elements, bool kUnits>
__global__ void __launch_bounds__(kChunkThreads, kBlocksOfUpdate<Elements, kUnits>)
    update_kernel(const UpdateArguments __grid_constant__ arguments) {
  if (!arguments.source.proceeds()) return;
  const Chunk chunk = backward_chunk(arguments.table, static_cast<int32_t>(blockIdx.x));
  const TensorOperands tensor = arguments.table.tensor(chunk.tensor, arguments.grads);
  if (chunk.begin == 0 && threadIdx.x == 0) {
    advance(arguments.table, chunk.tensor, arguments.scalars[chunk.tensor], arguments.taken);
  }
  Elements::with_compute_type(tensor, [&](auto element) __attribute__((always_inline)) {
    update_tensor<Elements, decltype(element), Named, kUnits>(arguments, tensor, chunk);
  });
}

template <class Named>
void launch_update(const char* function, const UpdateArguments& arguments, Stream stream) {
  if (arguments.source.units != nullptr && !arguments.gradients_are_final) {
    return with_unit_contents(arguments.table.contents, [&](auto elements) {
      launch(function, stream, update_kernel<Named, decltype(elements), true>, arguments.table.chunks,
             kChunkThreads, arguments);
    });
  }
  with_contents(arguments.table.contents, [&](auto elements) {
    launch(function, stream, update_kernel<Named, decltype(elements), false>, arguments.table.chunks,
           kChunkThreads, arguments);
  });
}

}  // namespace steadygrad::cuda
