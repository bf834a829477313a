// What happens to a gradient element between the backward pass and the update: unscale, penalty, clip,
// penalty.
#pragma once

#include <cmath>

#include "core/host_device.h"

namespace steadygrad {

// The derivative of l1 * |p| is l1 * sign(p), with sign(0) = 0 as in torch.sign.
template <class T>
STEADYGRAD_INLINE T sign(T value) {
  return static_cast<T>(value > T(0)) - static_cast<T>(value < T(0));
}

template <class T>
STEADYGRAD_INLINE bool is_finite(T value) {
  return value - value == T(0);
}

// The proximal operator of amount * |p| (Parikh and Boyd 2014, section 6.5.2); NaN stays NaN.
template <class T>
STEADYGRAD_INLINE T soft_threshold(T value, T amount) {
  const T shrunk = value > T(0) ? value - amount : value + amount;
  const T magnitude = value < T(0) ? -value : value;
  return magnitude <= amount ? T(0) : shrunk;
}

template <class T>
struct PenaltyGradient {
  T l1 = 0;
  T l2 = 0;

  STEADYGRAD_INLINE bool active() const { return l1 != T(0) || l2 != T(0); }
  // A zero coefficient adds nothing, even where 0 * param would be NaN.
  STEADYGRAD_INLINE T added_to(T grad, T param) const {
    grad = l1 != T(0) ? grad + l1 * sign(param) : grad;
    return l2 != T(0) ? grad + l2 * param : grad;
  }
};

// fp32 cannot represent a factor far below one, as from a huge norm, but it can represent two factors.
template <class T>
struct ScaleFactors {
  T first = 1;
  T second = 1;

  STEADYGRAD_INLINE T operator()(T value) const { return value * first * second; }
  STEADYGRAD_INLINE bool is_identity() const { return first == T(1) && second == T(1); }
};

template <class T>
STEADYGRAD_INLINE ScaleFactors<T> scale_factors(double factor) {
  ScaleFactors<T> factors;
  if (sizeof(T) == sizeof(float) && factor > 0 && factor < 0x1p-100) {
    factors.first = T(0x1p-100);
    factor *= 0x1p100;
  }
  factors.second = static_cast<T>(factor);
  return factors;
}

// min(1, limit / (norm + 1e-6)), the coefficient of torch.nn.utils.clip_grad_norm_. An infinite norm gives 0,
// and NaN stays NaN. An infinite limit never clips, while torch's inf / inf would turn every gradient into
// NaN.
STEADYGRAD_INLINE double clip_coefficient(double limit, double norm) {
  if (limit == INFINITY) return 1.0;
  const double coefficient = limit / (norm + 1e-6);
  return coefficient > 1.0 ? 1.0 : coefficient;
}

template <class T>
struct GradientTransform {
  ScaleFactors<T> unscale;
  PenaltyGradient<T> penalty_before_clip;
  bool zero_nonfinite = false;
  ScaleFactors<T> clip;
  T clip_value = T(INFINITY);
  PenaltyGradient<T> penalty_after_clip;

  STEADYGRAD_INLINE T before_clip(T grad, T param) const {
    grad = penalty_before_clip.added_to(unscale(grad), param);
    return zero_nonfinite && !is_finite(grad) ? T(0) : grad;
  }
  STEADYGRAD_INLINE T operator()(T grad, T param) const {
    grad = clip(before_clip(grad, param));
    grad = grad > clip_value ? clip_value : grad;
    grad = grad < -clip_value ? -clip_value : grad;
    return penalty_after_clip.added_to(grad, param);
  }
  STEADYGRAD_INLINE bool keeps_gradient_before_clip() const {
    return unscale.is_identity() && !penalty_before_clip.active() && !zero_nonfinite;
  }
  // If so, two multiplications are all there is: the loop of every clipped step without extras.
  STEADYGRAD_INLINE bool only_scales() const {
    return !penalty_before_clip.active() && !zero_nonfinite && clip_value == T(INFINITY) &&
           !penalty_after_clip.active();
  }
  STEADYGRAD_INLINE bool is_identity() const {
    return only_scales() && unscale.is_identity() && clip.is_identity();
  }
};

// The same transform as options of a param group and the coefficient of a tensor's scope, without T, which is
// known only where elements are read.
struct TransformOptions {
  double unscale = 1;
  double l1_before_clip = 0;
  double l2_before_clip = 0;
  double l1_after_clip = 0;
  double l2_after_clip = 0;
  double clip_coefficient = 1;
  double clip_value = INFINITY;
  bool zero_nonfinite = false;

  STEADYGRAD_INLINE bool reads_param() const {
    return l1_before_clip != 0 || l2_before_clip != 0 || l1_after_clip != 0 || l2_after_clip != 0;
  }
};

// The part of the transform that pass 1 applies: everything up to the clip.
template <class T>
STEADYGRAD_INLINE GradientTransform<T> transform_before_clip(const TransformOptions& options) {
  GradientTransform<T> transform;
  transform.unscale = scale_factors<T>(options.unscale);
  transform.penalty_before_clip = {T(options.l1_before_clip), T(options.l2_before_clip)};
  return transform;
}

// The whole transform, for pass 2. If nothing but factors is left, they become one product.
template <class T>
STEADYGRAD_INLINE GradientTransform<T> gradient_transform(const TransformOptions& options) {
  GradientTransform<T> transform = transform_before_clip<T>(options);
  transform.zero_nonfinite = options.zero_nonfinite;
  transform.clip = scale_factors<T>(options.clip_coefficient);
  transform.clip_value = T(options.clip_value);
  transform.penalty_after_clip = {T(options.l1_after_clip), T(options.l2_after_clip)};
  if (transform.only_scales()) {
    transform.unscale = ScaleFactors<T>();
    transform.clip = scale_factors<T>(options.unscale * options.clip_coefficient);
  }
  return transform;
}

}  // namespace steadygrad
