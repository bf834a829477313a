// torch.optim.Adagrad for one element.
#pragma once

#include <cmath>
#include <string_view>

#include "core/host_device.h"
#include "core/rules/division.h"
#include "core/rules/hyper.h"

namespace steadygrad {

inline constexpr NumberField kAdagradNumbers[] = {{"lr", &RuleHyper::lr},
                                                  {"lr_decay", &RuleHyper::lr_decay},
                                                  {"eps", &RuleHyper::eps},
                                                  {"weight_decay", &RuleHyper::weight_decay}};
inline constexpr FlagField kAdagradFlags[] = {{"maximize", &RuleHyper::maximize}};
inline constexpr StateField kAdagradStates[] = {{"sum"}};

template <class T, bool kDecay>
struct Adagrad {
  static constexpr int kStateCount = 1;

  T direction, step_size, weight_decay, eps;

  Adagrad() = default;
  STEADYGRAD_INLINE Adagrad(const RuleHyper& hyper, const StepScalars& scalars)
      : direction(T(hyper.maximize ? -1 : 1)),
        step_size(T(scalars.step_size)),
        weight_decay(T(hyper.weight_decay)),
        eps(T(hyper.eps)) {}

  STEADYGRAD_INLINE void operator()(T& param, T grad, T& sum, T&, T&) const {
    grad = direction * grad;
    if (kDecay) grad = grad + weight_decay * param;
    sum = sum + grad * grad;
    param = param - step_size * quotient(grad, square_root(sum) + eps);
  }
};

struct AdagradRule {
  static constexpr RuleKind kKind = RuleKind::adagrad;
  static constexpr std::string_view kName = "adagrad";
  static constexpr bool kHasStep = true;
  static constexpr FieldList<NumberField> kNumbers = kAdagradNumbers;
  static constexpr FieldList<FlagField> kFlags = kAdagradFlags;
  static constexpr FieldList<StateField> kStates = kAdagradStates;
  static constexpr FieldList<const char*> kStateNumbers = {};
  // The functor with all terms.
  template <class T>
  using Full = Adagrad<T, true>;

  STEADYGRAD_INLINE static int state_count(const RuleHyper&) { return 1; }

  STEADYGRAD_INLINE static StepScalars scalars(const RuleHyper& hyper, double step, const double*) {
    StepScalars scalars;
    scalars.step_size = hyper.lr / (1 + (step - 1) * hyper.lr_decay);
    return scalars;
  }

  template <class T, bool kDecay, class Function>
  STEADYGRAD_INLINE static void with_type(const RuleTerms&, Function function) {
    function(RuleType<Adagrad<T, kDecay>>{});
  }
};

}  // namespace steadygrad
