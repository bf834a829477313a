// The total norm, of every kind.
#include "core/norm.h"

#include <cmath>
#include <cstdlib>

#include "core/backend.h"
#include "sanitize/report.h"
#include "sanitize/tensor_set.h"

namespace steadygrad::sanitize {
namespace {

constexpr Uses kGradients{false, true};

// How far a norm from pairs of fp32 may be from that of sums in fp64, as a part of it.
constexpr double kPairPrecision = 0x1p-37;

enum class Sums { in_fp64, in_pairs };

std::string compare(const Specs& specs, Values values, double p, Sums sums = Sums::in_fp64) {
  setenv("STEADYGRAD_EMULATION_FP64_RATIO", sums == Sums::in_pairs ? "64" : "2", 1);
  const TensorSet tensors(specs, kGradients, values);
  Outcome cpu;
  cpu_backend().grad_norm(tensors.operands(), norm_type(p), {&cpu}, Reduction(), nullptr, Stream());
  const Single<Outcome> outcome;
  DeviceMemory memory;
  cuda_backend().grad_norm(tensors.operands(), norm_type(p), {outcome.get()}, Reduction(), memory.allocate(),
                           Stream());
  if (sums == Sums::in_pairs) {
    const double found = outcome.value().norm;
    const bool close = std::fabs(found - cpu.norm) <= kPairPrecision * cpu.norm;
    const std::string problem = close ? "" : difference("norm", cpu.norm, found);
    if (!problem.empty()) return problem;
    return difference_of_counts("nonfinite", cpu.nonfinite, outcome.value().nonfinite);
  }
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
    if (p == 2.0) {
      for (const Specs& specs : all_tensors()) {
        for (const auto& [name, values] : contents) {
          report.check("norm-in-pairs " + std::string(name), specs,
                       [&, values = values] { return compare(specs, values, 2.0, Sums::in_pairs); });
        }
      }
    }
    const Specs expanded = with_expanded_gradients(double_tensors());
    report.check(kind, expanded, [&] { return compare(expanded, Values::ordinary, p); });
  }
}

}  // namespace steadygrad::sanitize
