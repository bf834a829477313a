// The operations of the CPU backend. The caller checks the arguments; nothing here uses Python.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "core/scope_sums.h"
#include "core/step.h"
#include "core/step_memory.h"
#include "core/tensors.h"
#include "core/unit_clip.h"
#include "cpu/parallel.h"

namespace steadygrad::cpu {

using Tensors = std::vector<TensorOperands>;

// Computes the norms of every tensor's transformed gradient before the clip. It reads the gradients once, or
// twice for a general p. `transforms` has an entry per param group.
class GradNorms {
 public:
  GradNorms(const Tensors& tensors, const ChunkTable& table, const std::vector<TransformOptions>& transforms,
            NormType type);

  // Returns the norm over the tensors for which selected(tensor index) is true, in the order of the list.
  template <class Selected>
  Norm over(Selected selected) const {
    return norm_of(type_, sums_over(selected));
  }
  template <class Selected>
  ScopeSums sums_over(Selected selected) const {
    std::vector<size_t> chosen;
    for (size_t t = 0; t < partials_.size(); ++t) {
      if (!empty_[t] && selected(t)) chosen.push_back(t);
    }
    return sums_of(chosen);
  }
  Norm total() const {
    return over([](size_t) { return true; });
  }
  Norm of(size_t tensor) const { return norm_of(type_, sums_of_one(tensor)); }
  ScopeSums sums_of_one(size_t tensor) const;
  int64_t nonfinite(size_t tensor) const { return partials_[tensor].nonfinite; }

 private:
  ScopeSums sums_of(const std::vector<size_t>& chosen) const;

  NormType type_;
  std::vector<NormPartial> partials_;
  std::vector<double> scales_;
  std::vector<bool> empty_;
};

// Combines the rows of several scopes to one.
ScopeSums combined_sums(NormType type, const ScopeSums* rows, size_t count);

// Returns the norm of the tensors; with a reduction, of the tensors of all processes.
Norm grad_norm(const Tensors& tensors, const ChunkTable& table, NormType type, const Reduction& reduction);
inline Norm grad_norm(const Tensors& tensors, NormType type) {
  return grad_norm(tensors, ChunkTable(tensors), type, Reduction());
}

// Computes grad = transform(grad), with the options that transform_of returns for a tensor's index. Nothing
// is written if the options change nothing.
using TransformOf = std::function<TransformOptions(int32_t tensor)>;
using UnitsOf = std::function<TensorUnits(int32_t tensor)>;
void transform_grads(const Tensors& tensors, const ChunkTable& table, const TransformOf& transform_of,
                     const UnitsOf& units_of = nullptr);

// Adds l1 * sign(param) + l2 * param to the gradients; returns l1 * sum|param| + l2 / 2 * sum param^2.
double add_penalty(const Tensors& tensors, double l1, double l2);

// Computes param = sign(param) * max(|param| - amount, 0).
void soft_threshold(const Tensors& tensors, double amount);

// Takes a whole step in two passes: the norm, the decision, the update. `memory` is the host's, and holds the
// outcome on return. Before anything is written, and only if something will be, it calls before_write. If
// that throws, nothing has changed except that policies have already learnt from the norm; the step is not
// recorded.
using BeforeWrite = std::function<void(bool writes_grads)>;
void step(const Tensors& tensors, const std::vector<StepCounter>& counters,
          const std::vector<GroupOptions>& groups, const StepOptions& options, const StepMemory& memory,
          const Reduction& reduction, const BeforeWrite& before_write);

}  // namespace steadygrad::cpu
