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
  // How torch's class keeps its options and its state.
  FieldList<NumberField> numbers;
  FieldList<FlagField> flags;
  FieldList<StateField> states;
};

// "none" leaves the update to somebody else: only the gradients are transformed.
constexpr RuleEntry kRules[] = {
    {"none", RuleKind::none, false, {}, {}, {}},
    {"sgd", RuleKind::sgd, false, kSgdNumbers, kSgdFlags, kSgdStates},
    {"adam", RuleKind::adam, true, kAdamNumbers, kAdamFlags, kAdamStates},
    {"adagrad", RuleKind::adagrad, true, kAdagradNumbers, kAdagradFlags, kAdagradStates},
    {"rmsprop", RuleKind::rmsprop, true, kRmsPropNumbers, kRmsPropFlags, kRmsPropStates},
};

STEADYGRAD_INLINE StepScalars step_scalars(RuleKind kind, const RuleHyper& hyper, double step) {
  if (kind == RuleKind::adam) return adam_scalars(hyper, step);
  if (kind == RuleKind::adagrad) return adagrad_scalars(hyper, step);
  return {};
}

STEADYGRAD_INLINE int state_count(RuleKind kind, const RuleHyper& hyper) {
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

// The options that change which operands a rule has, or whether a term exists at all.
struct RuleTerms {
  bool decay = false;
  bool momentum = false;
  bool nesterov = false;
  bool amsgrad = false;
  bool centered = false;
};

STEADYGRAD_INLINE RuleTerms rule_terms(const RuleHyper& hyper) {
  return {hyper.weight_decay != 0 && !hyper.decoupled_weight_decay, hyper.momentum != 0, hyper.nesterov,
          hyper.amsgrad, hyper.centered};
}

template <class Rule>
struct RuleType {
  using type = Rule;
};

template <class T, RuleKind kKind, bool kDecay, class Function>
STEADYGRAD_INLINE void with_rule_type_of(const RuleTerms& terms, Function function) {
  if constexpr (kKind == RuleKind::sgd) {
    if (terms.momentum && terms.nesterov) return function(RuleType<Sgd<T, kDecay, true, true>>{});
    if (terms.momentum) return function(RuleType<Sgd<T, kDecay, true, false>>{});
    function(RuleType<Sgd<T, kDecay, false, false>>{});
  } else if constexpr (kKind == RuleKind::adam) {
    if (terms.amsgrad) return function(RuleType<Adam<T, kDecay, true>>{});
    function(RuleType<Adam<T, kDecay, false>>{});
  } else if constexpr (kKind == RuleKind::adagrad) {
    function(RuleType<Adagrad<T, kDecay>>{});
  } else if constexpr (kKind == RuleKind::rmsprop) {
    if (terms.centered && terms.momentum) return function(RuleType<RmsProp<T, kDecay, true, true>>{});
    if (terms.centered) return function(RuleType<RmsProp<T, kDecay, true, false>>{});
    if (terms.momentum) return function(RuleType<RmsProp<T, kDecay, false, true>>{});
    function(RuleType<RmsProp<T, kDecay, false, false>>{});
  }
}

// Calls function(RuleType<Rule>{}) with the functor of the rule that has these terms.
template <class T, RuleKind kKind, class Function>
STEADYGRAD_INLINE void with_rule_type(const RuleTerms& terms, Function function) {
  if (terms.decay) {
    with_rule_type_of<T, kKind, true>(terms, function);
  } else {
    with_rule_type_of<T, kKind, false>(terms, function);
  }
}

// Calls `function` with the rule as a functor, whose terms are compile-time constants, so that its loop has
// no branch.
template <class T, RuleKind kKind, class Function>
STEADYGRAD_INLINE void with_rule(const RuleHyper& hyper, const StepScalars& scalars, Function function) {
  with_rule_type<T, kKind>(rule_terms(hyper), [&](auto type) __attribute__((always_inline)) {
    function(typename decltype(type)::type(hyper, scalars));
  });
}

template <class T, class Function>
STEADYGRAD_INLINE void with_rule(RuleKind kind, const RuleHyper& hyper, const StepScalars& scalars,
                                 Function function) {
  switch (kind) {
    case RuleKind::none:
      return;
    case RuleKind::sgd:
      return with_rule<T, RuleKind::sgd>(hyper, scalars, function);
    case RuleKind::adam:
      return with_rule<T, RuleKind::adam>(hyper, scalars, function);
    case RuleKind::adagrad:
      return with_rule<T, RuleKind::adagrad>(hyper, scalars, function);
    case RuleKind::rmsprop:
      return with_rule<T, RuleKind::rmsprop>(hyper, scalars, function);
  }
}

// A rule with all its terms. Its numbers are those of the same rule with fewer terms, so that bit_cast makes
// one from it where the terms are looked at anew with every few elements.
template <class T, RuleKind kKind>
struct FullRule;
template <class T>
struct FullRule<T, RuleKind::sgd> : RuleType<Sgd<T, true, true, true>> {};
template <class T>
struct FullRule<T, RuleKind::adam> : RuleType<Adam<T, true, true>> {};
template <class T>
struct FullRule<T, RuleKind::adagrad> : RuleType<Adagrad<T, true>> {};
template <class T>
struct FullRule<T, RuleKind::rmsprop> : RuleType<RmsProp<T, true, true, true>> {};

}  // namespace steadygrad
