// The hyper-parameters of an update rule: one struct for all rules, a rule reads the fields it has.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace steadygrad {

// "none" leaves the update to somebody else: only the gradients are transformed.
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

// Numbers that the state of a parameter has beside its step counter and its tensors.
constexpr int kMaxNumbers = 2;

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

// By name, since nvcc writes a member's declaration in a way that GCC warns of.
using HyperNumber = double RuleHyper::*;
using HyperFlag = bool RuleHyper::*;

// A number of a param group: in [low, below), and finite.
struct NumberField {
  const char* key;
  HyperNumber to;
  double low = 0;
  double below = INFINITY;
  int index = -1;  // within a key that holds several numbers, as betas does; -1: it holds one
};

struct FlagField {
  const char* key;
  HyperFlag to;
};

// A state tensor, in the rule's order; null: it is always there.
struct StateField {
  const char* name;
  bool (*is_kept)(const RuleHyper& hyper) = nullptr;
};

// A list whose elements lie in static memory.
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

// What follows from the step counter of one tensor, in double as torch computes it in Python.
struct StepScalars {
  double step_size = 0;
  double inverse_sqrt_bias_correction2 = 1;
  double weight = 0;                 // of the second term, in rules that have one
  double numbers[kMaxNumbers] = {};  // the state's numbers once the step has been taken
  bool first = false;
};

// The options that change which operands a rule has, or whether a term exists at all.
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
