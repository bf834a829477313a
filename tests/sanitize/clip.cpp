// Clipping by norm and by value, and the transform of gradients in place.
#include <cmath>

#include "core/backend.h"
#include "core/gradient.h"
#include "sanitize/report.h"
#include "sanitize/tensor_set.h"

namespace steadygrad::sanitize {
namespace {

constexpr Uses kGradients{false, true};

// A case per list of tensors.
void check_all(Report& report, const std::string& name,
               const std::function<std::string(const Specs&)>& compare) {
  for (const Specs& specs : all_tensors()) report.check(name, specs, [&] { return compare(specs); });
}

void transform_on_cpu(const TensorSet& tensors, const TransformOptions& options) {
  cpu_backend().transform_grads(tensors.operands(), options, nullptr, Stream());
}

std::string compare_clip(const Specs& specs, Values values, double max_norm, double p, bool refuse) {
  const TensorSet cpu(specs, kGradients, values);
  const TensorSet emulated(specs, kGradients, values);
  const NormType type = norm_type(p);
  const BeforeWrite before_write = [](bool) {};
  Outcome expected;
  cpu_backend().clip_grad_norm(cpu.operands(), max_norm, type, refuse, {&expected}, Reduction(), before_write,
                               nullptr, Stream());
  const Single<Outcome> outcome;
  DeviceMemory memory;
  cuda_backend().clip_grad_norm(emulated.operands(), max_norm, type, refuse, {outcome.get()}, Reduction(),
                                before_write, memory.allocate(), Stream());
  std::string problem = difference("norm", expected.norm, outcome.value().norm);
  if (problem.empty()) problem = difference_of_counts("refused", expected.refused, outcome.value().refused);
  if (problem.empty())
    problem = difference_of_counts("nonfinite", expected.nonfinite, outcome.value().nonfinite);
  return problem.empty() ? cpu.difference_from(emulated) : problem;
}

// Clips with a norm that is already there, in device memory.
template <class T>
std::string compare_clip_with_norm(const Specs& specs, T total_norm, double max_norm) {
  const TensorSet cpu(specs, kGradients, Values::ordinary);
  const TensorSet emulated(specs, kGradients, Values::ordinary);
  const Single<T> norm(total_norm);
  const Number number{norm.get(), DTypeOf<T>::value};
  DeviceMemory memory;
  cpu_backend().clip_grads_with_norm(cpu.operands(), max_norm, number, nullptr, Stream());
  cuda_backend().clip_grads_with_norm(emulated.operands(), max_norm, number, memory.allocate(), Stream());
  return cpu.difference_from(emulated);
}

std::string compare_transform(const Specs& specs, Values values, const TransformOptions& options) {
  const Uses uses{options.reads_param(), true};
  const TensorSet cpu(specs, uses, values);
  const TensorSet emulated(specs, uses, values);
  transform_on_cpu(cpu, options);
  DeviceMemory memory;
  cuda_backend().transform_grads(emulated.operands(), options, memory.allocate(), Stream());
  return cpu.difference_from(emulated);
}

void check_clip_by_norm(Report& report) {
  struct Case {
    const char* name;
    Values values;
    double max_norm;
    double p;
    bool refuse;
  };
  const Case cases[] = {
      {"clip active", Values::ordinary, 1, 2, false},
      {"clip active, inf", Values::ordinary, 0.01, INFINITY, false},
      {"clip active, general", Values::ordinary, 1, 3, false},
      {"clip to nothing", Values::ordinary, 0, 2, false},
      {"clip by a factor that takes two", Values::ordinary, 1e-35, 2, false},
      {"clip inactive", Values::ordinary, 1e30, 2, false},
      {"clip without limit", Values::ordinary, INFINITY, 2, false},
      {"clip extreme", Values::extreme, 1, 2, false},
      {"clip nonfinite", Values::nonfinite, 1, 2, false},
      {"clip nonfinite, one", Values::nonfinite, 1, 1, false},
      {"clip refused", Values::nonfinite, 1, 2, true},
      {"clip not refused", Values::ordinary, 1, 2, true},
  };
  for (const Case& c : cases) {
    check_all(report, c.name,
              [&](const Specs& specs) { return compare_clip(specs, c.values, c.max_norm, c.p, c.refuse); });
  }
  for (const double max_norm : {1.0, 1e30}) {
    const std::string name = max_norm > 1 ? " inactive" : " active";
    check_all(report, "clip with fp32 norm" + name,
              [&](const Specs& specs) { return compare_clip_with_norm(specs, 7.5F, max_norm); });
    check_all(report, "clip with fp64 norm" + name,
              [&](const Specs& specs) { return compare_clip_with_norm(specs, 7.1, max_norm); });
  }
}

void check_transforms(Report& report) {
  std::vector<std::pair<std::string, TransformOptions>> cases;
  const auto add = [&](const char* name) -> TransformOptions& {
    return cases.emplace_back(name, TransformOptions()).second;
  };
  add("transform by nothing");
  add("transform by value").clip_value = 0.05;
  add("transform by unscale").unscale = 1.0 / 1024;
  TransformOptions& before = add("transform with penalties before the clip");
  before.l1_before_clip = 0.01;
  before.l2_before_clip = 0.1;
  before.clip_coefficient = 0.3;
  TransformOptions& after = add("transform with penalties after the clip");
  after.l1_after_clip = 0.01;
  after.l2_after_clip = 0.1;
  after.clip_coefficient = 0.3;
  after.clip_value = 0.02;
  add("transform with l2 before the clip").l2_before_clip = 0.1;
  add("transform of nonfinite").zero_nonfinite = true;
  for (const auto& [name, options] : cases) {
    const Values values = options.zero_nonfinite ? Values::nonfinite : Values::ordinary;
    check_all(report, name, [&, &options = options](const Specs& specs) {
      return compare_transform(specs, values, options);
    });
  }
}

}  // namespace

void check_clips(Report& report) {
  check_clip_by_norm(report);
  check_transforms(report);
}

}  // namespace steadygrad::sanitize
