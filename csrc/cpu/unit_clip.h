// Clipping by output unit on the CPU: the pass that computes the coefficients, and how pass 2 applies them.
#pragma once

#include <algorithm>
#include <vector>

#include "core/backend.h"
#include "core/policy.h"
#include "core/unit_clip.h"
#include "cpu/parallel.h"
#include "cpu/vector_kernels.h"

namespace steadygrad::cpu {

// The coefficients of a step's units; by default there are none.
class UnitClips {
 public:
  UnitClips() = default;
  UnitClips(UnitClips&&) = default;
  UnitClips& operator=(UnitClips&&) = default;
  // Computes them for a step that proceeds, from one more read of gradients and parameters. One thread reads
  // a unit.
  UnitClips(const Tensors& tensors, const std::vector<GroupOptions>& groups,
            const std::vector<TransformOptions>& transforms, double eps);

  // Returns whether any coefficient is not 1.
  bool clip() const { return clip_; }
  TensorUnits of(size_t tensor) const { return units_.empty() ? TensorUnits() : units_[tensor]; }

 private:
  std::vector<TensorUnits> units_;  // per tensor
  std::vector<double> coefficients_;
  bool clip_ = false;
};

// Computes out = transform(grad) for the elements [begin, begin + count) of a tensor. `out` may be `grad`,
// and `param` is null if no penalty reads it.
template <class T>
void transform_units(T* out, const T* grad, const T* param, int64_t begin, int64_t count,
                     TransformOptions options, const TensorUnits& units) {
  const double scope = options.clip_coefficient;
  for (int64_t done = 0; done < count;) {
    const int64_t unit = (begin + done) / units.size;
    const int64_t end = std::min(count, (unit + 1) * units.size - begin);
    options.clip_coefficient = smaller_coefficient(units.coefficients[unit], scope);
    const GradientTransform<T> transform = gradient_transform<T>(options);
    if (out != grad || !transform.is_identity()) {
      vector_kernels<T>().transform(out + done, grad + done, param == nullptr ? nullptr : param + done,
                                    end - done, transform);
    }
    done = end;
  }
}

}  // namespace steadygrad::cpu
