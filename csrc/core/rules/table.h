// The update rules by name: a new rule is one file beside this one and its lines here.
#pragma once

#include <string_view>

#include "core/rules/adagrad.h"
#include "core/rules/adam.h"
#include "core/rules/hyper.h"
#include "core/rules/rmsprop.h"
#include "core/rules/sgd.h"

namespace steadygrad {

struct RuleEntry {
  std::string_view name;
  RuleKind kind;
  bool has_step;  // keeps a step counter per parameter
};

// "none" leaves the update to somebody else: only the gradients are transformed.
constexpr RuleEntry kRules[] = {
    {"none", RuleKind::none, false},      {"sgd", RuleKind::sgd, false},
    {"adam", RuleKind::adam, true},       {"adagrad", RuleKind::adagrad, true},
    {"rmsprop", RuleKind::rmsprop, true},
};

inline StepScalars step_scalars(RuleKind kind, const RuleHyper& hyper, double step) {
  if (kind == RuleKind::adam) return adam_scalars(hyper, step);
  if (kind == RuleKind::adagrad) return adagrad_scalars(hyper, step);
  return {};
}

inline int state_count(RuleKind kind, const RuleHyper& hyper) {
  switch (kind) {
    case RuleKind::none:
      return 0;
    case RuleKind::sgd:
      return hyper.momentum != 0 ? 1 : 0;
    case RuleKind::adam:
      return hyper.amsgrad ? 3 : 2;
    case RuleKind::adagrad:
      return 1;
    case RuleKind::rmsprop:
      return 1 + (hyper.centered ? 1 : 0) + (hyper.momentum != 0 ? 1 : 0);
  }
  return 0;
}

// Calls `function` with the rule as a functor whose options that change its operands are compile-time constants.
template <class T, class Function>
STEADYGRAD_INLINE void with_rule(RuleKind kind, const RuleHyper& hyper, const StepScalars& scalars,
                                 Function function) {
  const bool momentum = hyper.momentum != 0;
  switch (kind) {
    case RuleKind::none:
      return;
    case RuleKind::sgd:
      if (momentum) return function(Sgd<T, true>(hyper, scalars));
      return function(Sgd<T, false>(hyper, scalars));
    case RuleKind::adam:
      if (hyper.amsgrad) return function(Adam<T, true>(hyper, scalars));
      return function(Adam<T, false>(hyper, scalars));
    case RuleKind::adagrad:
      return function(Adagrad<T>(hyper, scalars));
    case RuleKind::rmsprop:
      if (hyper.centered && momentum) return function(RmsProp<T, true, true>(hyper, scalars));
      if (hyper.centered) return function(RmsProp<T, true, false>(hyper, scalars));
      if (momentum) return function(RmsProp<T, false, true>(hyper, scalars));
      return function(RmsProp<T, false, false>(hyper, scalars));
  }
}

}  // namespace steadygrad
