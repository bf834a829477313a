// torch.optim.Adam and AdamW (decoupled weight decay) for one element.
#pragma once

#include <cmath>
#include <string_view>

#include "core/host_device.h"
#include "core/rules/division.h"
#include "core/rules/hyper.h"

namespace steadygrad {

inline constexpr NumberField kAdamNumbers[] = {{"lr", &RuleHyper::lr},
                                               {"betas", &RuleHyper::beta1, 0, 1, 0},
                                               {"betas", &RuleHyper::beta2, 0, 1, 1},
                                               {"eps", &RuleHyper::eps},
                                               {"weight_decay", &RuleHyper::weight_decay}};
inline constexpr FlagField kAdamFlags[] = {{"amsgrad", &RuleHyper::amsgrad},
                                           {"maximize", &RuleHyper::maximize},
                                           {"decoupled_weight_decay", &RuleHyper::decoupled_weight_decay}};
inline bool is_amsgrad(const RuleHyper& hyper) { return hyper.amsgrad; }
inline constexpr StateField kAdamStates[] = {{"exp_avg"}, {"exp_avg_sq"}, {"max_exp_avg_sq", is_amsgrad}};

template <class T, bool kDecay, bool kAmsgrad>
struct Adam {
  static constexpr int kStateCount = kAmsgrad ? 3 : 2;

  T direction, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, decay, step_size,
      inverse_sqrt_bias_correction2;

  Adam() = default;
  STEADYGRAD_INLINE Adam(const RuleHyper& hyper, const StepScalars& scalars)
      : direction(T(hyper.maximize ? -1 : 1)),
        beta1(T(hyper.beta1)),
        one_minus_beta1(T(1 - hyper.beta1)),
        beta2(T(hyper.beta2)),
        one_minus_beta2(T(1 - hyper.beta2)),
        eps(T(hyper.eps)),
        weight_decay(T(hyper.weight_decay)),
        decay(T(hyper.decoupled_weight_decay ? 1 - hyper.lr * hyper.weight_decay : 1)),
        step_size(T(scalars.step_size)),
        inverse_sqrt_bias_correction2(T(scalars.inverse_sqrt_bias_correction2)) {}

  STEADYGRAD_INLINE void operator()(T& param, T grad, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq) const {
    grad = direction * grad;
    if (kDecay) grad = grad + weight_decay * param;
    exp_avg = exp_avg * beta1 + one_minus_beta1 * grad;
    exp_avg_sq = exp_avg_sq * beta2 + one_minus_beta2 * grad * grad;
    T second_moment = exp_avg_sq;
    if (kAmsgrad) {
      second_moment = max_exp_avg_sq > second_moment ? max_exp_avg_sq : second_moment;
      max_exp_avg_sq = second_moment;
    }
    const T denominator = square_root(second_moment) * inverse_sqrt_bias_correction2 + eps;
    param = param * decay - step_size * quotient(exp_avg, denominator);
  }
};

struct AdamRule {
  static constexpr RuleKind kKind = RuleKind::adam;
  static constexpr std::string_view kName = "adam";
  static constexpr bool kHasStep = true;
  static constexpr FieldList<NumberField> kNumbers = kAdamNumbers;
  static constexpr FieldList<FlagField> kFlags = kAdamFlags;
  static constexpr FieldList<StateField> kStates = kAdamStates;
  static constexpr FieldList<const char*> kStateNumbers = {};
  // The functor with all terms.
  template <class T>
  using Full = Adam<T, true, true>;

  STEADYGRAD_INLINE static int state_count(const RuleHyper& hyper) { return hyper.amsgrad ? 3 : 2; }

  STEADYGRAD_INLINE static StepScalars scalars(const RuleHyper& hyper, double step, const double*) {
    StepScalars scalars;
    scalars.step_size = hyper.lr / (1 - std::pow(hyper.beta1, step));
    scalars.inverse_sqrt_bias_correction2 = 1 / std::sqrt(1 - std::pow(hyper.beta2, step));
    return scalars;
  }

  template <class T, bool kDecay, class Function>
  STEADYGRAD_INLINE static void with_type(const RuleTerms& terms, Function function) {
    if (terms.amsgrad) return function(RuleType<Adam<T, kDecay, true>>{});
    function(RuleType<Adam<T, kDecay, false>>{});
  }
};

}  // namespace steadygrad
