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

STEADYGRAD_INLINE StepScalars step_scalars(RuleKind kind, const RuleHyper& hyper, double step) {
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

template <class T, bool kDecay, class Function>
STEADYGRAD_INLINE void with_rule_of(RuleKind kind, const RuleHyper& hyper, const StepScalars& scalars,
                                    Function function) {
  const bool momentum = hyper.momentum != 0;
  switch (kind) {
    case RuleKind::none:
      return;
    case RuleKind::sgd:
      if (momentum && hyper.nesterov) return function(Sgd<T, kDecay, true, true>(hyper, scalars));
      if (momentum) return function(Sgd<T, kDecay, true, false>(hyper, scalars));
      return function(Sgd<T, kDecay, false, false>(hyper, scalars));
    case RuleKind::adam:
      if (hyper.amsgrad) return function(Adam<T, kDecay, true>(hyper, scalars));
      return function(Adam<T, kDecay, false>(hyper, scalars));
    case RuleKind::adagrad:
      return function(Adagrad<T, kDecay>(hyper, scalars));
    case RuleKind::rmsprop:
      if (hyper.centered && momentum) return function(RmsProp<T, kDecay, true, true>(hyper, scalars));
      if (hyper.centered) return function(RmsProp<T, kDecay, true, false>(hyper, scalars));
      if (momentum) return function(RmsProp<T, kDecay, false, true>(hyper, scalars));
      return function(RmsProp<T, kDecay, false, false>(hyper, scalars));
  }
}

// Calls `function` with the rule as a functor. Options that change which operands it has, or whether a term
// exists at all, are compile-time constants, so that its loop has no branch.
template <class T, class Function>
STEADYGRAD_INLINE void with_rule(RuleKind kind, const RuleHyper& hyper, const StepScalars& scalars,
                                 Function function) {
  const bool decay = hyper.weight_decay != 0 && !hyper.decoupled_weight_decay;
  if (decay) {
    with_rule_of<T, true>(kind, hyper, scalars, function);
  } else {
    with_rule_of<T, false>(kind, hyper, scalars, function);
  }
}

}  // namespace steadygrad
