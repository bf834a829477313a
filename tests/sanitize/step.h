// Steps of an optimizer, taken by both backends side by side.
#pragma once

#include <string>
#include <vector>

#include "core/policy.h"
#include "core/step.h"
#include "sanitize/rules.h"
#include "sanitize/tensor_set.h"

namespace steadygrad::sanitize {

struct StepCase {
  Specs specs;
  RuleVariant rule;
  StepOptions options;
  // The options of the first group; every further group has a larger learning rate and a smaller limit.
  GroupOptions group;
  // The kind of each step's gradients, which are new in every step.
  std::vector<Values> gradients = {Values::ordinary, Values::ordinary};
  // Learning rate, gradient scale and found_inf are in device memory.
  bool numbers_on_device = false;
  // Every second step leaves out some of the tensors.
  bool tensors_come_and_go = false;
  // Each backend has its own rows for these policies. The window of a percentile is full from the beginning.
  Policies policies;
  // Another process holds the same, and does not count every third tensor.
  bool two_processes = false;
};

// Returns how the backends differ after any of the steps, in results or in what they report about them.
std::string compare_steps(const StepCase& step_case);

}  // namespace steadygrad::sanitize
