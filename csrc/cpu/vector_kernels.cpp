// This file is compiled once per instruction set into a namespace of that name. Everything here has internal
// linkage or is always inlined, so that no code of one instruction set can be linked into another.
#include "cpu/vector_kernels.h"

#include "core/rules/table.h"

// The iterations of the next loop are independent of each other, wherever its operands are in memory.
#if defined(__clang__)
#define STEADYGRAD_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define STEADYGRAD_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace steadygrad::cpu::STEADYGRAD_INSTRUCTION_SET {
namespace {

// A vector fills one AVX-512 register of doubles; narrower instruction sets split it. `aligned(8)` lets it be
// loaded from any element.
constexpr int kWidth = 8;
typedef double DoubleVector __attribute__((vector_size(kWidth * sizeof(double))));
template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kWidth * sizeof(float)), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kWidth * sizeof(double)), aligned(8), may_alias));
};

// This distance is beyond the hardware prefetcher's reach, which ends at a page boundary.
constexpr int64_t kPrefetchAhead = 4096;

template <class T, class Term, class Combine>
STEADYGRAD_INLINE void accumulate(double* lanes, const T* in, int64_t count, Term term, Combine combine) {
  constexpr int kVectors = kLanes / kWidth;
  using Input = typename VectorOf<T>::type;
  DoubleVector sums[kVectors];
  const int64_t rows = count / kLanes;
  if (rows > 0) {
    for (int k = 0; k < kVectors; ++k) sums[k] = *reinterpret_cast<const DoubleVector*>(lanes + k * kWidth);
    for (int64_t row = 0; row < rows; ++row) {
      const T* line = in + row * kLanes;
      for (size_t k = 0; k < kLanes * sizeof(T) / 64; ++k) {
        __builtin_prefetch(line + kPrefetchAhead + k * (64 / sizeof(T)));
      }
#pragma GCC unroll 16
      for (int k = 0; k < kVectors; ++k) {
        const Input input = *reinterpret_cast<const Input*>(line + k * kWidth);
        sums[k] = combine(sums[k], term(__builtin_convertvector(input, DoubleVector)));
      }
    }
    for (int k = 0; k < kVectors; ++k) *reinterpret_cast<DoubleVector*>(lanes + k * kWidth) = sums[k];
  }
  STEADYGRAD_INDEPENDENT
  for (int64_t i = rows * kLanes; i < count; ++i) {
    double& lane = lanes[i - rows * kLanes];
    lane = combine(lane, term(static_cast<double>(in[i])));
  }
}

template <class T>
STEADYGRAD_INLINE void accumulate_squares(NormLanes& lanes, const T* in, int64_t count) {
  if constexpr (sizeof(T) == sizeof(float)) {
    accumulate(lanes.medium, in, count, Square(), Add());
    return;
  }
  accumulate(lanes.small, in, count, SmallSquare(), Add());
  accumulate(lanes.medium, in, count, MediumSquare(), Add());
  accumulate(lanes.large, in, count, LargeSquare(), Add());
}

template <class T>
void accumulate_norm(NormLanes& lanes, const T* in, int64_t count, NormType type, double scale) {
  switch (type.kind) {
    case NormKind::two:
      return accumulate_squares(lanes, in, count);
    case NormKind::one:
      return accumulate(lanes.medium, in, count, Magnitude(), Add());
    case NormKind::infinity:
      return accumulate(lanes.medium, in, count, Magnitude(), Max());
    case NormKind::negative_infinity:
      return accumulate(lanes.medium, in, count, Magnitude(), Min());
    case NormKind::zero:
    case NormKind::general:
      for (int64_t i = 0; i < count; ++i) lanes.medium[i % kLanes] += norm_term(type, in[i], scale);
      return;
  }
}

template <class T>
void count_nonfinite(const T* in, int64_t count, int64_t& nonfinite, int64_t& nan) {
  int64_t not_finite = 0;
  int64_t not_a_number = 0;
  for (int64_t i = 0; i < count; ++i) {
    not_finite += is_finite(in[i]) ? 0 : 1;
    not_a_number += in[i] != in[i] ? 1 : 0;
  }
  nonfinite += not_finite;
  nan += not_a_number;
}

template <class T>
void zero_nonfinite(T* out, const T* in, int64_t count) {
  STEADYGRAD_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) out[i] = is_finite(in[i]) ? in[i] : T(0);
}

template <class T>
void load(T* __restrict out, const void* in, DType dtype, int64_t count) {
  switch (dtype) {
    case DType::float32: {
      const auto* from = static_cast<const float*>(in);
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(from[i]);
      return;
    }
    case DType::float64: {
      const auto* from = static_cast<const double*>(in);
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(from[i]);
      return;
    }
    case DType::bfloat16: {
      const auto* from = static_cast<const BFloat16*>(in);
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(to_float(from[i]));
      return;
    }
    case DType::float16: {
      const auto* from = static_cast<const Float16*>(in);
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(to_float(from[i]));
      return;
    }
  }
}

template <class T>
void store(void* __restrict out, DType dtype, const T* in, int64_t count) {
  switch (dtype) {
    case DType::float32: {
      auto* to = static_cast<float*>(out);
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(in[i]);
      return;
    }
    case DType::float64: {
      auto* to = static_cast<double*>(out);
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<double>(in[i]);
      return;
    }
    case DType::bfloat16: {
      auto* to = static_cast<BFloat16*>(out);
      for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(static_cast<float>(in[i]));
      return;
    }
    case DType::float16: {
      auto* to = static_cast<Float16*>(out);
      for (int64_t i = 0; i < count; ++i) to[i] = to_float16(static_cast<float>(in[i]));
      return;
    }
  }
}

// `out` may be `grad` itself, since each element depends only on its own input. `param` is null if no penalty
// reads it; the element that is passed instead is not used then.
template <class T>
void before_clip(T* out, const T* grad, const T* param, int64_t count,
                 const GradientTransform<T>& transform) {
  const GradientTransform<T> local = transform;
  if (param == nullptr) param = grad;
  STEADYGRAD_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) out[i] = local.before_clip(grad[i], param[i]);
}

template <class T>
void transform_gradient(T* out, const T* grad, const T* param, int64_t count,
                        const GradientTransform<T>& transform) {
  const GradientTransform<T> local = transform;
  if (local.only_scales()) {
    STEADYGRAD_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) out[i] = local.clip(grad[i]);
    return;
  }
  if (param == nullptr) param = grad;
  STEADYGRAD_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) out[i] = local(grad[i], param[i]);
}

template <class T>
void soft_threshold_kernel(T* param, int64_t count, T amount) {
  for (int64_t i = 0; i < count; ++i) param[i] = soft_threshold(param[i], amount);
}

template <class T, class Rule>
STEADYGRAD_INLINE void update_loop(const Tile<T>& tile, const Rule rule, const ScaleFactors<T> scale) {
  T* const param = tile.param;
  const T* const grad = tile.grad;
  T* const state0 = tile.states[0];
  T* const state1 = tile.states[1];
  T* const state2 = tile.states[2];
  STEADYGRAD_INDEPENDENT
  for (int64_t i = 0; i < tile.count; ++i) {
    T p = param[i];
    T s0 = 0, s1 = 0, s2 = 0;
    if constexpr (Rule::kStateCount > 0) s0 = state0[i];
    if constexpr (Rule::kStateCount > 1) s1 = state1[i];
    if constexpr (Rule::kStateCount > 2) s2 = state2[i];
    rule(p, scale(grad[i]), s0, s1, s2);
    if constexpr (Rule::kStateCount > 0) state0[i] = s0;
    if constexpr (Rule::kStateCount > 1) state1[i] = s1;
    if constexpr (Rule::kStateCount > 2) state2[i] = s2;
    param[i] = p;
  }
}

template <class T>
void update(const Tile<T>& tile, const RuleStep& step, const ScaleFactors<T>& scale) {
  const ScaleFactors<T> local = scale;
  with_rule_of(step.kind, [&](auto rule) __attribute__((always_inline)) {
    with_functor<T, decltype(rule)>(
        step.hyper, step.scalars,
        [&](auto functor) __attribute__((always_inline)) { update_loop<T>(tile, functor, local); });
  });
}

// For parameters in fp64 nothing is kept beside them.
template <class T>
void join(T* param, const T* extra, int64_t count, const ParamStorage& storage) {
  if constexpr (sizeof(T) == sizeof(float)) {
    with_storage(storage.rounding, storage.dtype, [&](auto rounding, auto element) {
      STEADYGRAD_INDEPENDENT
      for (int64_t i = 0; i < count; ++i) {
        param[i] = joined<decltype(rounding)::value, decltype(element)>(param[i], extra[i]);
      }
    });
  }
}

template <class T>
void split(T* value, T* extra, int64_t first, int64_t count, const ParamStorage& storage) {
  if constexpr (sizeof(T) == sizeof(float)) {
    const RandomKey random = storage.random;
    with_storage(storage.rounding, storage.dtype, [&](auto rounding, auto element) {
      constexpr Rounding kRounding = decltype(rounding)::value;
      STEADYGRAD_INDEPENDENT
      for (int64_t i = 0; i < count; ++i) {
        float kept = 0;
        const uint32_t bits = random_bits(random, static_cast<uint32_t>(first + i));
        value[i] = steadygrad::split<kRounding, decltype(element)>(value[i], kept, bits);
        if constexpr (keeps_extra(kRounding)) extra[i] = kept;
      }
    });
  }
}

template <class T>
constexpr VectorKernels<T> kTable = {load<T>,
                                     store<T>,
                                     accumulate_norm<T>,
                                     count_nonfinite<T>,
                                     zero_nonfinite<T>,
                                     before_clip<T>,
                                     transform_gradient<T>,
                                     soft_threshold_kernel<T>,
                                     update<T>,
                                     join<T>,
                                     split<T>};

}  // namespace

const VectorKernels<float>& float_kernels() { return kTable<float>; }
const VectorKernels<double>& double_kernels() { return kTable<double>; }

}  // namespace steadygrad::cpu::STEADYGRAD_INSTRUCTION_SET
