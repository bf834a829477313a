// The total norm, of every kind.
#include "core/norm.h"

#include <cmath>

#include "core/backend.h"
#include "sanitize/report.h"
#include "sanitize/tensor_set.h"

namespace steadygrad::sanitize {
namespace {

constexpr Uses kGradients{false, true};

std::string compare(const Specs& specs, Values values, double p) {
  const TensorSet tensors(specs, kGradients, values);
  Outcome cpu;
  cpu_backend().grad_norm(tensors.operands(), norm_type(p), {&cpu}, Reduction(), nullptr, Stream());
  const Single<Outcome> outcome;
  DeviceMemory memory;
  cuda_backend().grad_norm(tensors.operands(), norm_type(p), {outcome.get()}, Reduction(), memory.allocate(),
                           Stream());
  std::string problem = difference("norm", cpu.norm, outcome.value().norm);
  if (problem.empty())
    problem = difference("fp32 norm", static_cast<float>(cpu.norm), outcome.value().norm_float32);
  if (problem.empty()) problem = difference_of_counts("nonfinite", cpu.nonfinite, outcome.value().nonfinite);
  return problem;
}

}  // namespace

void check_norms(Report& report) {
  const std::pair<const char*, Values> contents[] = {
      {"ordinary", Values::ordinary}, {"extreme", Values::extreme}, {"nonfinite", Values::nonfinite}};
  for (const double p : {2.0, 1.0, 0.0, double{INFINITY}, -double{INFINITY}, 3.0, 0.5, -1.5}) {
    const std::string kind = "norm " + std::to_string(p) + " ";
    for (const Specs& specs : all_tensors()) {
      for (const auto& [name, values] : contents) {
        report.check(kind + name, specs, [&, values = values] { return compare(specs, values, p); });
      }
    }
    const Specs expanded = with_expanded_gradients(double_tensors());
    report.check(kind, expanded, [&] { return compare(expanded, Values::ordinary, p); });
  }
}

}  // namespace steadygrad::sanitize
