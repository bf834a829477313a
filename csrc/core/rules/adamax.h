// torch.optim.Adamax for one element.
#pragma once

#include <cmath>
#include <string_view>

#include "core/host_device.h"
#include "core/rules/division.h"
#include "core/rules/hyper.h"

namespace steadygrad {

inline constexpr NumberField kAdamaxNumbers[] = {{"lr", &RuleHyper::lr},
                                                 {"betas", &RuleHyper::beta1, 0, 1, 0},
                                                 {"betas", &RuleHyper::beta2, 0, 1, 1},
                                                 {"eps", &RuleHyper::eps},
                                                 {"weight_decay", &RuleHyper::weight_decay}};
inline constexpr FlagField kAdamaxFlags[] = {{"maximize", &RuleHyper::maximize}};
inline constexpr StateField kAdamaxStates[] = {{"exp_avg"}, {"exp_inf"}};

template <class T, bool kDecay>
struct Adamax {
  static constexpr int kStateCount = 2;

  T direction, beta1, one_minus_beta1, beta2, eps, weight_decay, step_size;

  Adamax() = default;
  STEADYGRAD_INLINE Adamax(const RuleHyper& hyper, const StepScalars& scalars)
      : direction(T(hyper.maximize ? -1 : 1)),
        beta1(T(hyper.beta1)),
        one_minus_beta1(T(1 - hyper.beta1)),
        beta2(T(hyper.beta2)),
        eps(T(hyper.eps)),
        weight_decay(T(hyper.weight_decay)),
        step_size(T(scalars.step_size)) {}

  STEADYGRAD_INLINE void operator()(T& param, T grad, T& exp_avg, T& exp_inf, T&) const {
    grad = direction * grad;
    if (kDecay) grad = grad + weight_decay * param;
    exp_avg = exp_avg * beta1 + one_minus_beta1 * grad;
    const T decayed = exp_inf * beta2;
    const T magnitude = std::abs(grad) + eps;
    // NaN on either side is kept, as in torch.
    exp_inf = decayed > magnitude || decayed != decayed ? decayed : magnitude;
    param = param - step_size * quotient(exp_avg, exp_inf);
  }
};

struct AdamaxRule {
  static constexpr RuleKind kKind = RuleKind::adamax;
  static constexpr std::string_view kName = "adamax";
  static constexpr bool kHasStep = true;
  static constexpr FieldList<NumberField> kNumbers = kAdamaxNumbers;
  static constexpr FieldList<FlagField> kFlags = kAdamaxFlags;
  static constexpr FieldList<StateField> kStates = kAdamaxStates;
  static constexpr FieldList<const char*> kStateNumbers = {};
  // The functor with all terms.
  template <class T>
  using Full = Adamax<T, true>;

  STEADYGRAD_INLINE static int state_count(const RuleHyper&) { return 2; }

  STEADYGRAD_INLINE static StepScalars scalars(const RuleHyper& hyper, double step, const double*) {
    StepScalars scalars;
    scalars.step_size = hyper.lr / (1 - std::pow(hyper.beta1, step));
    return scalars;
  }

  template <class T, bool kDecay, class Function>
  STEADYGRAD_INLINE static void with_type(const RuleTerms&, Function function) {
    function(RuleType<Adamax<T, kDecay>>{});
  }
};

}  // namespace steadygrad
