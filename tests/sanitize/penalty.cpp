// Penalties on their own: added to gradients, and the proximal step.
#include <cmath>

#include "core/backend.h"
#include "sanitize/report.h"
#include "sanitize/tensor_set.h"

namespace steadygrad::sanitize {
namespace {

std::string compare_penalty(const Specs& specs, double l1, double l2) {
  constexpr Uses kUses{true, true};
  const TensorSet cpu(specs, kUses, Values::nonfinite);
  const TensorSet emulated(specs, kUses, Values::nonfinite);
  double expected = 0;
  cpu_backend().add_penalty(cpu.operands(), l1, l2, &expected, nullptr, Stream());
  const Single<double> value;
  DeviceMemory memory;
  cuda_backend().add_penalty(emulated.operands(), l1, l2, value.get(), memory.allocate(), Stream());
  const std::string problem = difference("value", expected, value.value());
  return problem.empty() ? cpu.difference_from(emulated) : problem;
}

std::string compare_threshold(const Specs& specs, double amount) {
  constexpr Uses kUses{true, false};
  const TensorSet cpu(specs, kUses, Values::ordinary);
  const TensorSet emulated(specs, kUses, Values::ordinary);
  cpu_backend().soft_threshold(cpu.operands(), amount, nullptr, Stream());
  DeviceMemory memory;
  cuda_backend().soft_threshold(emulated.operands(), amount, memory.allocate(), Stream());
  return cpu.difference_from(emulated);
}

}  // namespace

void check_penalties(Report& report) {
  for (const Specs& specs : all_tensors()) {
    report.check("penalty l1", specs, [&] { return compare_penalty(specs, 0.01, 0); });
    report.check("penalty l2", specs, [&] { return compare_penalty(specs, 0, 0.1); });
    report.check("penalty l1 and l2", specs, [&] { return compare_penalty(specs, 0.01, 0.1); });
    report.check("penalty of nothing", specs, [&] { return compare_penalty(specs, 0, 0); });
    report.check("threshold", specs, [&] { return compare_threshold(specs, 0.03); });
    report.check("threshold of all", specs, [&] { return compare_threshold(specs, INFINITY); });
  }
}

}  // namespace steadygrad::sanitize
