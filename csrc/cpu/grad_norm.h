// Pass 1 as the other operations use it.
#pragma once

#include <vector>

#include "core/backend.h"
#include "cpu/parallel.h"

namespace steadygrad::cpu {

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
Norm total_norm(const Tensors& tensors, const ChunkTable& table, NormType type, const Reduction& reduction);

}  // namespace steadygrad::cpu
