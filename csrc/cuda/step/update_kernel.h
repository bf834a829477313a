// The kernel of pass 2, which the file of each rule instantiates.
#pragma once

#include "cuda/launch.h"
#include "cuda/step/octets.h"
#include "cuda/step/update.h"

namespace steadygrad::cuda {

// Elements of one parameter that are updated together, in the type they are computed in.
template <class T, int kCount>
struct Updated {
  T param[kCount];
  T grad[kCount];
  // As many as the rule keeps.
  T states[kMaxStates][kCount];
  // Where the parameter's storage keeps something beside it.
  T extra[kCount];
};

// Transforms the gradients of elements index, index + kApart, index + 2 * kApart, ...
template <int kApart, class T, int kCount>
__device__ __forceinline__ void transform_elements(const GradientTransform<T>& transform,
                                                   Updated<T, kCount>& elements, int64_t) {
  if (transform.only_scales()) {
    // gradient_transform() has made one factor of all.
#pragma unroll
    for (int k = 0; k < kCount; ++k) elements.grad[k] = transform.clip(elements.grad[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) elements.grad[k] = transform(elements.grad[k], elements.param[k]);
  }
}
template <int kApart, class T, int kCount>
__device__ __forceinline__ void transform_elements(const UnitTransform<T>& transform,
                                                   Updated<T, kCount>& elements, int64_t index) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    elements.grad[k] = transform(elements.grad[k], elements.param[k], index + k * kApart);
  }
}

// Updates tensors that are fp32 and contiguous, four elements at a time.
template <class Rule, class Transform>
struct DirectUpdate {
  static constexpr int kStates = Rule::kStateCount;

  Rule rule;
  Transform transform;
  float threshold;

  template <int kApart>
  __device__ __forceinline__ void operator()(Updated<float, kQuad>& elements, int64_t index) const {
    transform_elements<kApart>(transform, elements, index);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      rule(elements.param[k], elements.grad[k], elements.states[0][k], elements.states[1][k],
           elements.states[2][k]);
    }
    if (threshold != 0) {
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        elements.param[k] = steadygrad::soft_threshold(elements.param[k], threshold);
      }
    }
  }

  __device__ __forceinline__ static bool all_aligned(const TensorOperands& tensor) {
    bool all = is_aligned<float>(tensor.param) && is_aligned<float>(tensor.grad);
#pragma unroll
    for (int s = 0; s < kStates; ++s) all = all && is_aligned<float>(tensor.states[s]);
    return all;
  }

  __device__ __forceinline__ int32_t update_quads(const TensorOperands& tensor, const Chunk& chunk) const {
    float* const params = elements_of<float>(tensor.param) + chunk.begin;
    const float* const grads = elements_of<const float>(tensor.grad) + chunk.begin;
    const int32_t quads = chunk.count / kQuad;
    for (int32_t q = threadIdx.x; q < quads; q += kChunkThreads) {
      Updated<float, kQuad> elements;
      load_quad<float>(params + q * kQuad, elements.param);
      load_quad<float>(grads + q * kQuad, elements.grad);
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        load_quad<float>(elements_of<const float>(tensor.states[s]) + chunk.begin + q * kQuad,
                         elements.states[s]);
      }
      operator()<1>(elements, chunk.begin + q * kQuad);
      store_quad<float>(params + q * kQuad, elements.param);
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        store_quad<float>(elements_of<float>(tensor.states[s]) + chunk.begin + q * kQuad, elements.states[s]);
      }
    }
    return quads * kQuad;
  }

  // The elements from `done` on, wherever they lie: those of a thread are kChunkThreads apart, so that a warp
  // accesses neighbours.
  __device__ __forceinline__ void update_apart(const TensorOperands& tensor, const Chunk& chunk,
                                               int32_t done) const {
    float* const params = elements_of<float>(tensor.param) + chunk.begin;
    const float* const grads = elements_of<const float>(tensor.grad) + chunk.begin;
    for (int32_t first = done + threadIdx.x; first < chunk.count; first += kQuad * kChunkThreads) {
      Updated<float, kQuad> elements;
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        const int32_t i = first + k * kChunkThreads;
        const bool is_there = i < chunk.count;
        elements.param[k] = is_there ? params[i] : 0.0f;
        elements.grad[k] = is_there ? grads[i] : 0.0f;
#pragma unroll
        for (int s = 0; s < kStates; ++s) {
          const float* const states = elements_of<const float>(tensor.states[s]) + chunk.begin;
          elements.states[s][k] = is_there ? states[i] : 0.0f;
        }
      }
      operator()<kChunkThreads>(elements, chunk.begin + first);
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        const int32_t i = first + k * kChunkThreads;
        if (i >= chunk.count) continue;
        params[i] = elements.param[k];
#pragma unroll
        for (int s = 0; s < kStates; ++s) {
          (elements_of<float>(tensor.states[s]) + chunk.begin)[i] = elements.states[s][k];
        }
      }
    }
  }

  __device__ __forceinline__ void update(const TensorOperands& tensor, const Chunk& chunk) const {
    update_apart(tensor, chunk, all_aligned(tensor) ? update_quads(tensor, chunk) : 0);
  }
};

// Updates tensors of any types and layouts. Loads, conversions and stores are compiled once for all terms of
// a rule, and a branch that is the same for the whole block chooses the terms: a copy of everything for each
// of up to eight variants took minutes to compile.
template <class Elements, class T, class Named, class Transform>
struct MixedUpdate {
  using Rule = typename Named::template Full<T>;
  static constexpr int kStates = Rule::kStateCount;
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
    transform_elements<1>(transform, elements, index);
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

  // Whether `holds` is true of every operand.
  template <class Holds>
  __device__ __forceinline__ bool all_operands(const TensorOperands& tensor, Holds holds) const {
    bool all = holds(tensor.param) && holds(tensor.grad);
#pragma unroll
    for (int s = 0; s < kStates; ++s) all = all && (s >= states || holds(tensor.states[s]));
    return all && (!keeps_extra(storage.rounding) || holds(tensor.extra));
  }

  struct RawOctets {
    RawOctet param, grad, states[kMaxStates], extra;
  };

  // Calls function(operand, its octet) for all that an update reads, or that it writes.
  template <class Octets, class Function>
  __device__ __forceinline__ void for_each(const TensorOperands& tensor, Octets& raw, bool reads,
                                           Function function) const {
    function(tensor.param, raw.param);
    if (reads) function(tensor.grad, raw.grad);
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      if (s < states) function(tensor.states[s], raw.states[s]);
    }
    if (keeps_extra(storage.rounding)) function(tensor.extra, raw.extra);
  }

  // Four at a time, which takes fewer registers than all eight.
  __device__ __forceinline__ void update_raw(const TensorOperands& tensor, int64_t index, uint32_t place,
                                             RawOctets& raw) const {
#pragma unroll
    for (int half = 0; half < kOctet / kQuad; ++half) {
      Updated<float, kQuad> elements;
      unpack_quad(raw.param, tensor.param.dtype, half, elements.param);
      unpack_quad(raw.grad, tensor.grad.dtype, half, elements.grad);
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        if (s < states) unpack_quad(raw.states[s], tensor.states[s].dtype, half, elements.states[s]);
      }
      if (keeps_extra(storage.rounding)) unpack_quad(raw.extra, tensor.extra.dtype, half, elements.extra);
      (*this)(elements, index + half * kQuad, place + half * kQuad);
      pack_quad(elements.param, tensor.param.dtype, half, raw.param);
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        if (s < states) pack_quad(elements.states[s], tensor.states[s].dtype, half, raw.states[s]);
      }
      if (keeps_extra(storage.rounding)) pack_quad(elements.extra, tensor.extra.dtype, half, raw.extra);
    }
  }

  __device__ __forceinline__ int32_t update_octets(const TensorOperands& tensor, const Chunk& chunk) const {
    const bool aligned =
        all_operands(tensor, [](const Operand& operand) { return takes_vectors(operand.data); });
    const int32_t octets = chunk.count / kOctet;
#pragma unroll 1
    for (int32_t o = threadIdx.x; o < octets; o += kChunkThreads) {
      const int64_t index = chunk.begin + o * kOctet;
      RawOctets raw;
      // All loads are under way before the first of them is waited for.
      if (aligned) {
        for_each(tensor, raw, true,
                 [&](const Operand& operand, RawOctet& octet) { load_octet(operand, index, octet); });
      } else {
        for_each(tensor, raw, true,
                 [&](const Operand& operand, RawOctet& octet) { load_octet_apart(operand, index, octet); });
      }
      update_raw(tensor, index, static_cast<uint32_t>(o * kOctet), raw);
      if (aligned) {
        for_each(tensor, raw, false,
                 [&](const Operand& operand, const RawOctet& octet) { store_octet(operand, index, octet); });
      } else {
        for_each(tensor, raw, false, [&](const Operand& operand, const RawOctet& octet) {
          store_octet_apart(operand, index, octet);
        });
      }
    }
    return octets * kOctet;
  }

  __device__ __forceinline__ void update(const TensorOperands& tensor, const Chunk& chunk) const {
    const bool has_extra = kHalf && keeps_extra(storage.rounding);
    int32_t done = 0;
    if constexpr (std::is_same_v<T, float>) {
      if (all_operands(tensor, has_octets)) done = update_octets(tensor, chunk);
    }
#pragma unroll 1
    for (int32_t i = done + threadIdx.x; i < chunk.count; i += kChunkThreads) {
      const int64_t index = chunk.begin + i;
      Updated<T, 1> elements;
      elements.param[0] = Elements::template load<T>(tensor, tensor.param, index);
      elements.grad[0] = Elements::template load<T>(tensor, tensor.grad, index);
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        if (s < states) elements.states[s][0] = Elements::template load<T>(tensor, tensor.states[s], index);
      }
      if (has_extra) elements.extra[0] = Elements::template load<T>(tensor, tensor.extra, index);
      (*this)(elements, index, static_cast<uint32_t>(i));
      Elements::template store<T>(tensor, tensor.param, index, elements.param[0]);
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
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
constexpr int kBlocksOfUpdate = kUnits             ? 3
                                : Elements::kMixed ? 4
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
