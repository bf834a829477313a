// torch.optim.Adadelta for one element.
#pragma once

#include <cmath>
#include <string_view>

#include "core/host_device.h"
#include "core/rules/hyper.h"

namespace steadygrad {

inline constexpr NumberField kAdadeltaNumbers[] = {{"lr", &RuleHyper::lr},
                                                   {"rho", &RuleHyper::rho},
                                                   {"eps", &RuleHyper::eps},
                                                   {"weight_decay", &RuleHyper::weight_decay}};
inline constexpr FlagField kAdadeltaFlags[] = {{"maximize", &RuleHyper::maximize}};
inline constexpr StateField kAdadeltaStates[] = {{"square_avg"}, {"acc_delta"}};

template <class T, bool kDecay>
struct Adadelta {
  static constexpr int kStateCount = 2;

  T direction, lr, rho, one_minus_rho, eps, weight_decay;

  Adadelta() = default;
  STEADYGRAD_INLINE Adadelta(const RuleHyper& hyper, const StepScalars&)
      : direction(T(hyper.maximize ? -1 : 1)),
        lr(T(hyper.lr)),
        rho(T(hyper.rho)),
        one_minus_rho(T(1 - hyper.rho)),
        eps(T(hyper.eps)),
        weight_decay(T(hyper.weight_decay)) {}

  STEADYGRAD_INLINE void operator()(T& param, T grad, T& square_avg, T& acc_delta, T&) const {
    grad = direction * grad;
    if (kDecay) grad = grad + weight_decay * param;
    square_avg = square_avg * rho + one_minus_rho * grad * grad;
    const T delta = std::sqrt(acc_delta + eps) / std::sqrt(square_avg + eps) * grad;
    acc_delta = acc_delta * rho + one_minus_rho * delta * delta;
    param = param - lr * delta;
  }
};

struct AdadeltaRule {
  static constexpr RuleKind kKind = RuleKind::adadelta;
  static constexpr std::string_view kName = "adadelta";
  static constexpr bool kHasStep = true;
  static constexpr FieldList<NumberField> kNumbers = kAdadeltaNumbers;
  static constexpr FieldList<FlagField> kFlags = kAdadeltaFlags;
  static constexpr FieldList<StateField> kStates = kAdadeltaStates;
  static constexpr FieldList<const char*> kStateNumbers = {};
  // The functor with all terms.
  template <class T>
  using Full = Adadelta<T, true>;

  STEADYGRAD_INLINE static int state_count(const RuleHyper&) { return 2; }

  STEADYGRAD_INLINE static StepScalars scalars(const RuleHyper&, double, const double*) { return {}; }

  template <class T, bool kDecay, class Function>
  STEADYGRAD_INLINE static void with_type(const RuleTerms&, Function function) {
    function(RuleType<Adadelta<T, kDecay>>{});
  }
};

}  // namespace steadygrad
