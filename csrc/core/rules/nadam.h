// torch.optim.NAdam for one element.
#pragma once

#include <cmath>
#include <string_view>

#include "core/host_device.h"
#include "core/rules/division.h"
#include "core/rules/hyper.h"

namespace steadygrad {

inline constexpr NumberField kNAdamNumbers[] = {{"lr", &RuleHyper::lr},
                                                {"betas", &RuleHyper::beta1, 0, 1, 0},
                                                {"betas", &RuleHyper::beta2, 0, 1, 1},
                                                {"eps", &RuleHyper::eps},
                                                {"weight_decay", &RuleHyper::weight_decay},
                                                {"momentum_decay", &RuleHyper::momentum_decay}};
inline constexpr FlagField kNAdamFlags[] = {{"decoupled_weight_decay", &RuleHyper::decoupled_weight_decay},
                                            {"maximize", &RuleHyper::maximize}};
inline constexpr StateField kNAdamStates[] = {{"exp_avg"}, {"exp_avg_sq"}};
inline constexpr const char* kNAdamStateNumbers[] = {"mu_product"};

template <class T, bool kDecay>
struct NAdam {
  static constexpr int kStateCount = 2;

  T direction, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, decay, step_size,
      momentum_step_size, inverse_sqrt_bias_correction2;

  NAdam() = default;
  STEADYGRAD_INLINE NAdam(const RuleHyper& hyper, const StepScalars& scalars)
      : direction(T(hyper.maximize ? -1 : 1)),
        beta1(T(hyper.beta1)),
        one_minus_beta1(T(1 - hyper.beta1)),
        beta2(T(hyper.beta2)),
        one_minus_beta2(T(1 - hyper.beta2)),
        eps(T(hyper.eps)),
        weight_decay(T(hyper.weight_decay)),
        decay(T(hyper.decoupled_weight_decay ? 1 - hyper.lr * hyper.weight_decay : 1)),
        step_size(T(scalars.step_size)),
        momentum_step_size(T(scalars.weight)),
        inverse_sqrt_bias_correction2(T(scalars.inverse_sqrt_bias_correction2)) {}

  STEADYGRAD_INLINE void operator()(T& param, T grad, T& exp_avg, T& exp_avg_sq, T&) const {
    grad = direction * grad;
    if (kDecay) grad = grad + weight_decay * param;
    exp_avg = exp_avg * beta1 + one_minus_beta1 * grad;
    exp_avg_sq = exp_avg_sq * beta2 + one_minus_beta2 * grad * grad;
    const T denominator = square_root(exp_avg_sq) * inverse_sqrt_bias_correction2 + eps;
    param = param * decay - step_size * quotient(grad, denominator) -
            momentum_step_size * quotient(exp_avg, denominator);
  }
};

struct NAdamRule {
  static constexpr RuleKind kKind = RuleKind::nadam;
  static constexpr std::string_view kName = "nadam";
  static constexpr bool kHasStep = true;
  static constexpr FieldList<NumberField> kNumbers = kNAdamNumbers;
  static constexpr FieldList<FlagField> kFlags = kNAdamFlags;
  static constexpr FieldList<StateField> kStates = kNAdamStates;
  static constexpr FieldList<const char*> kStateNumbers = kNAdamStateNumbers;
  // The functor with all terms.
  template <class T>
  using Full = NAdam<T, true>;

  STEADYGRAD_INLINE static int state_count(const RuleHyper&) { return 2; }

  STEADYGRAD_INLINE static double momentum(const RuleHyper& hyper, double step) {
    return hyper.beta1 * (1 - 0.5 * std::pow(0.96, step * hyper.momentum_decay));
  }

  STEADYGRAD_INLINE static StepScalars scalars(const RuleHyper& hyper, double step, const double* numbers) {
    const double mu = momentum(hyper, step);
    const double next_mu = momentum(hyper, step + 1);
    const double mu_product = numbers[0] * mu;
    StepScalars scalars;
    scalars.step_size = hyper.lr * (1 - mu) / (1 - mu_product);
    scalars.weight = hyper.lr * next_mu / (1 - mu_product * next_mu);
    scalars.inverse_sqrt_bias_correction2 = 1 / std::sqrt(1 - std::pow(hyper.beta2, step));
    scalars.numbers[0] = mu_product;
    return scalars;
  }

  template <class T, bool kDecay, class Function>
  STEADYGRAD_INLINE static void with_type(const RuleTerms&, Function function) {
    function(RuleType<NAdam<T, kDecay>>{});
  }
};

}  // namespace steadygrad
