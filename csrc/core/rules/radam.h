// torch.optim.RAdam for one element.
#pragma once

#include <cmath>
#include <string_view>

#include "core/host_device.h"
#include "core/rules/division.h"
#include "core/rules/hyper.h"

namespace steadygrad {

inline constexpr NumberField kRAdamNumbers[] = {{"lr", &RuleHyper::lr},
                                                {"betas", &RuleHyper::beta1, 0, 1, 0},
                                                {"betas", &RuleHyper::beta2, 0, 1, 1},
                                                {"eps", &RuleHyper::eps},
                                                {"weight_decay", &RuleHyper::weight_decay}};
inline constexpr FlagField kRAdamFlags[] = {{"decoupled_weight_decay", &RuleHyper::decoupled_weight_decay},
                                            {"maximize", &RuleHyper::maximize}};
inline constexpr StateField kRAdamStates[] = {{"exp_avg"}, {"exp_avg_sq"}};

template <class T, bool kDecay>
struct RAdam {
  static constexpr int kStateCount = 2;

  T direction, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, decay, step_size,
      rectification;

  RAdam() = default;
  STEADYGRAD_INLINE RAdam(const RuleHyper& hyper, const StepScalars& scalars)
      : direction(T(hyper.maximize ? -1 : 1)),
        beta1(T(hyper.beta1)),
        one_minus_beta1(T(1 - hyper.beta1)),
        beta2(T(hyper.beta2)),
        one_minus_beta2(T(1 - hyper.beta2)),
        eps(T(hyper.eps)),
        weight_decay(T(hyper.weight_decay)),
        decay(T(hyper.decoupled_weight_decay ? 1 - hyper.lr * hyper.weight_decay : 1)),
        step_size(T(scalars.step_size)),
        rectification(T(scalars.weight)) {}

  STEADYGRAD_INLINE void operator()(T& param, T grad, T& exp_avg, T& exp_avg_sq, T&) const {
    grad = direction * grad;
    if (kDecay) grad = grad + weight_decay * param;
    exp_avg = exp_avg * beta1 + one_minus_beta1 * grad;
    exp_avg_sq = exp_avg_sq * beta2 + one_minus_beta2 * grad * grad;
    // In the first steps the variance cannot be rectified, and the average alone is taken.
    const T factor = rectification != T(0) ? rectification / (square_root(exp_avg_sq) + eps) : T(1);
    param = param * decay - step_size * (exp_avg * factor);
  }
};

struct RAdamRule {
  static constexpr RuleKind kKind = RuleKind::radam;
  static constexpr std::string_view kName = "radam";
  static constexpr bool kHasStep = true;
  static constexpr FieldList<NumberField> kNumbers = kRAdamNumbers;
  static constexpr FieldList<FlagField> kFlags = kRAdamFlags;
  static constexpr FieldList<StateField> kStates = kRAdamStates;
  static constexpr FieldList<const char*> kStateNumbers = {};
  // The functor with all terms.
  template <class T>
  using Full = RAdam<T, true>;

  STEADYGRAD_INLINE static int state_count(const RuleHyper&) { return 2; }

  STEADYGRAD_INLINE static StepScalars scalars(const RuleHyper& hyper, double step, const double*) {
    const double power = std::pow(hyper.beta2, step);
    const double bias_correction2 = 1 - power;
    const double longest = 2 / (1 - hyper.beta2) - 1;
    const double length = longest - 2 * step * power / bias_correction2;
    StepScalars scalars;
    scalars.step_size = hyper.lr / (1 - std::pow(hyper.beta1, step));
    if (length > 5) {
      const double ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length);
      scalars.weight = std::sqrt(ratio) * std::sqrt(bias_correction2);
    }
    return scalars;
  }

  template <class T, bool kDecay, class Function>
  STEADYGRAD_INLINE static void with_type(const RuleTerms&, Function function) {
    function(RuleType<RAdam<T, kDecay>>{});
  }
};

}  // namespace steadygrad
