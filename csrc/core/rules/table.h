// The list of update rules. A new rule is a file beside this one, a kind in hyper.h and an entry in this
// list.
#pragma once

#include <array>
#include <string_view>

#include "core/rules/adadelta.h"
#include "core/rules/adagrad.h"
#include "core/rules/adam.h"
#include "core/rules/adamax.h"
#include "core/rules/asgd.h"
#include "core/rules/hyper.h"
#include "core/rules/lion.h"
#include "core/rules/nadam.h"
#include "core/rules/radam.h"
#include "core/rules/rmsprop.h"
#include "core/rules/rprop.h"
#include "core/rules/sgd.h"

namespace steadygrad {

template <class... Rule>
struct RuleList {};

using Rules = RuleList<SgdRule, AdamRule, AdagradRule, RmsPropRule, AdamaxRule, NAdamRule, RAdamRule,
                       AdadeltaRule, AsgdRule, RpropRule, LionRule>;

struct RuleEntry {
  std::string_view name;
  RuleKind kind;
  bool has_step;  // keeps a step counter per parameter
  // The options and the state as torch's class names them.
  FieldList<NumberField> numbers;
  FieldList<FlagField> flags;
  FieldList<StateField> states;
  FieldList<const char*> state_numbers;  // numbers beside the step counter

  constexpr size_t number_count() const {
    return (has_step ? 1 : 0) + static_cast<size_t>(state_numbers.end() - state_numbers.begin());
  }
};

template <class... Rule>
constexpr std::array<RuleEntry, 1 + sizeof...(Rule)> rule_entries(RuleList<Rule...>) {
  return {RuleEntry{"none", RuleKind::none, false, {}, {}, {}, {}},
          RuleEntry{Rule::kName, Rule::kKind, Rule::kHasStep, Rule::kNumbers, Rule::kFlags, Rule::kStates,
                    Rule::kStateNumbers}...};
}

constexpr auto kRules = rule_entries(Rules());

template <class Function, class... Rule>
STEADYGRAD_INLINE void with_rule_in(RuleList<Rule...>, RuleKind kind, Function function) {
  (void)((kind == Rule::kKind && (function(Rule()), true)) || ...);
}

// Calls function(Rule()) with the rule of this kind, or does nothing for "none".
template <class Function>
STEADYGRAD_INLINE void with_rule_of(RuleKind kind, Function function) {
  with_rule_in(Rules(), kind, function);
}

// `numbers` are the numbers of the state before the step.
STEADYGRAD_INLINE StepScalars step_scalars(RuleKind kind, const RuleHyper& hyper, double step,
                                           const double* numbers) {
  StepScalars scalars;
  with_rule_of(kind, [&](auto rule) __attribute__((always_inline)) {
    scalars = decltype(rule)::scalars(hyper, step, numbers);
  });
  return scalars;
}

STEADYGRAD_INLINE int state_count(RuleKind kind, const RuleHyper& hyper) {
  int count = 0;
  with_rule_of(kind,
               [&](auto rule) __attribute__((always_inline)) { count = decltype(rule)::state_count(hyper); });
  return count;
}

STEADYGRAD_INLINE RuleTerms rule_terms(const RuleHyper& hyper) {
  return {hyper.weight_decay != 0 && !hyper.decoupled_weight_decay, hyper.momentum != 0, hyper.nesterov,
          hyper.amsgrad, hyper.centered};
}

// Calls function(RuleType<Functor>{}) with the functor of the rule that has these terms. It has the same
// members as the functor with all terms, so that bit_cast converts between them in loops that look at the
// terms as they go.
template <class T, class Rule, class Function>
STEADYGRAD_INLINE void with_rule_type(const RuleTerms& terms, Function function) {
  if (terms.decay) {
    Rule::template with_type<T, true>(terms, function);
  } else {
    Rule::template with_type<T, false>(terms, function);
  }
}

// Calls `function` with the rule as a functor whose terms are compile-time constants, so that its loop has no
// branch.
template <class T, class Rule, class Function>
STEADYGRAD_INLINE void with_functor(const RuleHyper& hyper, const StepScalars& scalars, Function function) {
  with_rule_type<T, Rule>(rule_terms(hyper), [&](auto type) __attribute__((always_inline)) {
    function(typename decltype(type)::type(hyper, scalars));
  });
}

}  // namespace steadygrad
