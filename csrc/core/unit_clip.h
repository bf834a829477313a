// Clipping by output unit: each row of a weight has a limit of its own, relative to the norm of its
// parameters (Brock et al. 2021, "High-performance large-scale image recognition without normalization",
// section 4.1).
#pragma once

#include <cmath>
#include <cstdint>

#include "core/gradient.h"
#include "core/host_device.h"
#include "core/tensors.h"

namespace steadygrad {

// A tensor's units; each holds `size` elements, one after the other in the order of the visit.
struct TensorUnits {
  double* coefficients = nullptr;  // null if this tensor is not clipped by unit
  int64_t size = 0;
  uint64_t reciprocal = 0;  // 2^64 / size, since a 64-bit division is a function call on a GPU
  int64_t first = 0;        // place of its first unit among the units of all tensors

  // Returns the unit of an element. The product with the reciprocal is at most one too small.
  STEADYGRAD_INLINE int64_t unit_of(int64_t index) const {
    const uint64_t element = static_cast<uint64_t>(index);
    const uint64_t quotient =
        static_cast<uint64_t>(static_cast<unsigned __int128>(element) * reciprocal >> 64);
    const bool is_less = element - quotient * static_cast<uint64_t>(size) >= static_cast<uint64_t>(size);
    return static_cast<int64_t>(quotient + (is_less ? 1 : 0));
  }
};

// Counts a tensor's units: rows of a matrix, filters of a convolution; a vector or a scalar is one unit.
inline int64_t unit_count(const TensorOperands& tensor) {
  return tensor.numel == 0 ? 0 : tensor.ndim >= 2 ? tensor.sizes[0] : 1;
}

// Returns the units of a tensor that is clipped, still without their coefficients.
inline TensorUnits units_of(const TensorOperands& tensor, int64_t first) {
  TensorUnits units;
  units.first = first;
  const int64_t count = unit_count(tensor);
  if (count == 0) return units;
  units.size = tensor.numel / count;
  units.reciprocal = UINT64_MAX / static_cast<uint64_t>(units.size);
  return units;
}

// A non-finite gradient has no limit that makes it finite: an infinite norm gives 0, and NaN stays NaN.
STEADYGRAD_INLINE double unit_coefficient(double clipping, double eps, double param_norm, double grad_norm) {
  const double limit = clipping * (param_norm < eps ? eps : param_norm);
  return grad_norm <= limit ? 1.0 : limit / grad_norm;
}

// Returns the smaller of a unit's and its tensor's scope's coefficient, or NaN if one of them is NaN.
STEADYGRAD_INLINE double smaller_coefficient(double unit, double scope) {
  return scope < unit || scope != scope ? scope : unit;
}

// The whole transform for elements whose coefficient depends on their unit.
template <class T>
struct UnitTransform {
  GradientTransform<T> of_tensor;
  bool only_scales = false;
  double unscale = 1;
  double scope_coefficient = 1;
  TensorUnits units;

  STEADYGRAD_INLINE T operator()(T grad, T param, int64_t index) const {
    double coefficient = scope_coefficient;
    if (units.coefficients != nullptr) {
      coefficient = smaller_coefficient(units.coefficients[units.unit_of(index)], scope_coefficient);
    }
    GradientTransform<T> transform = of_tensor;
    transform.clip = scale_factors<T>(only_scales ? unscale * coefficient : coefficient);
    return transform(grad, param);
  }
};

template <class T>
STEADYGRAD_INLINE UnitTransform<T> unit_transform(const TransformOptions& options, const TensorUnits& units) {
  UnitTransform<T> transform;
  transform.of_tensor = gradient_transform<T>(options);
  transform.only_scales = transform.of_tensor.only_scales();
  transform.unscale = options.unscale;
  transform.scope_coefficient = options.clip_coefficient;
  transform.units = units;
  return transform;
}

}  // namespace steadygrad
