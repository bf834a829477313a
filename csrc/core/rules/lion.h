// Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms") for one element.
#pragma once

#include <string_view>

#include "core/host_device.h"
#include "core/rules/hyper.h"

namespace steadygrad {

inline constexpr NumberField kLionNumbers[] = {{"lr", &RuleHyper::lr},
                                               {"betas", &RuleHyper::beta1, 0, 1, 0},
                                               {"betas", &RuleHyper::beta2, 0, 1, 1},
                                               {"weight_decay", &RuleHyper::weight_decay}};
inline constexpr FlagField kLionFlags[] = {{"maximize", &RuleHyper::maximize}};
inline constexpr StateField kLionStates[] = {{"exp_avg"}};

template <class T>
struct Lion {
  static constexpr int kStateCount = 1;

  T direction, lr, decay, beta1, one_minus_beta1, beta2, one_minus_beta2;

  Lion() = default;
  STEADYGRAD_INLINE Lion(const RuleHyper& hyper, const StepScalars&)
      : direction(T(hyper.maximize ? -1 : 1)),
        lr(T(hyper.lr)),
        decay(T(1 - hyper.lr * hyper.weight_decay)),
        beta1(T(hyper.beta1)),
        one_minus_beta1(T(1 - hyper.beta1)),
        beta2(T(hyper.beta2)),
        one_minus_beta2(T(1 - hyper.beta2)) {}

  STEADYGRAD_INLINE void operator()(T& param, T grad, T& exp_avg, T&, T&) const {
    grad = direction * grad;
    const T update = exp_avg * beta1 + one_minus_beta1 * grad;
    exp_avg = exp_avg * beta2 + one_minus_beta2 * grad;
    param = param * decay - (update > T(0) ? lr : update < T(0) ? -lr : T(0));
  }
};

struct LionRule {
  static constexpr RuleKind kKind = RuleKind::lion;
  static constexpr std::string_view kName = "lion";
  static constexpr bool kHasStep = false;
  static constexpr FieldList<NumberField> kNumbers = kLionNumbers;
  static constexpr FieldList<FlagField> kFlags = kLionFlags;
  static constexpr FieldList<StateField> kStates = kLionStates;
  static constexpr FieldList<const char*> kStateNumbers = {};
  // The functor with all terms.
  template <class T>
  using Full = Lion<T>;

  STEADYGRAD_INLINE static int state_count(const RuleHyper&) { return 1; }

  STEADYGRAD_INLINE static StepScalars scalars(const RuleHyper&, double, const double*) { return {}; }

  template <class T, bool kDecay, class Function>
  STEADYGRAD_INLINE static void with_type(const RuleTerms&, Function function) {
    function(RuleType<Lion<T>>{});
  }
};

}  // namespace steadygrad
