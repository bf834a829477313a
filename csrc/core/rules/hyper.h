// The hyper-parameters of update rules: one struct for all rules, each of which reads the fields that it has.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace steadygrad {

// "none" means that something else does the update, and only the gradients are transformed.
enum class RuleKind : uint8_t {
  none,
  sgd,
  adam,
  adagrad,
  rmsprop,
  adamax,
  nadam,
  radam,
  adadelta,
  asgd,
  rprop,
  lion
};

// The largest number of numbers that a parameter's state has beside its step counter and its tensors.
constexpr int kMaxNumbers = 2;

// The options of a rule, constant over a param group in one step, with the names of torch's constructors.
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
  double rho = 0;
  double lambd = 0;
  double t0 = 0;
  double momentum_decay = 0;
  double etaminus = 0;
  double etaplus = 0;
  double step_size_min = 0;
  double step_size_max = 0;
  bool nesterov = false;
  bool maximize = false;
  bool amsgrad = false;
  bool centered = false;
  bool decoupled_weight_decay = false;
};

// These types have names, since nvcc rewrites the declaration of such a member in a way that GCC warns of.
using HyperNumber = double RuleHyper::*;
using HyperFlag = bool RuleHyper::*;

// A finite number of a param group in [low, below).
struct NumberField {
  const char* key;
  HyperNumber to;
  double low = 0;
  double below = INFINITY;
  int index = -1;  // index in a key with several numbers, such as betas; -1 if the key has one number
};

struct FlagField {
  const char* key;
  HyperFlag to;
};

// A state tensor, in the rule's order; is_kept is null if it always exists.
struct StateField {
  const char* name;
  bool (*is_kept)(const RuleHyper& hyper) = nullptr;
};

// A list whose elements are in static memory.
template <class T>
struct FieldList {
  constexpr FieldList() = default;
  template <size_t kSize>
  constexpr FieldList(const T (&fields)[kSize]) : first(fields), last(fields + kSize) {}
  constexpr const T* begin() const { return first; }
  constexpr const T* end() const { return last; }

  const T* first = nullptr;
  const T* last = nullptr;
};

inline bool has_momentum(const RuleHyper& hyper) { return hyper.momentum != 0; }

// The numbers that follow from the step counter of one tensor, in double as torch computes them in Python.
struct StepScalars {
  double step_size = 0;
  double inverse_sqrt_bias_correction2 = 1;
  double weight = 0;                 // weight of the second term, in rules that have one
  double numbers[kMaxNumbers] = {};  // the state's numbers after the step
  bool first = false;
};

// The options that decide which operands a rule has, or whether a term exists at all.
struct RuleTerms {
  bool decay = false;
  bool momentum = false;
  bool nesterov = false;
  bool amsgrad = false;
  bool centered = false;
};

template <class Rule>
struct RuleType {
  using type = Rule;
};

}  // namespace steadygrad
