// The hyper-parameters of an update rule: one struct for all rules, a rule reads the fields it has.
#pragma once

#include <cstdint>

namespace steadygrad {

enum class RuleKind : uint8_t { none, sgd, adam, adagrad, rmsprop };

// Constant over a param group in one step. Names are those of torch's constructors.
struct RuleHyper {
  double lr = 0;
  double weight_decay = 0;
  double momentum = 0;
  double dampening = 0;
  double beta1 = 0;
  double beta2 = 0;
  double eps = 0;
  double alpha = 0;
  double lr_decay = 0;
  bool nesterov = false;
  bool maximize = false;
  bool amsgrad = false;
  bool centered = false;
  bool decoupled_weight_decay = false;
};

// What follows from the step counter of one tensor, in double as torch computes it in Python.
struct StepScalars {
  double step_size = 0;
  double inverse_sqrt_bias_correction2 = 1;
  bool first = false;
};

}  // namespace steadygrad
