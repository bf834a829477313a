// torch.optim.ASGD for one element.
#pragma once

#include <cmath>
#include <string_view>

#include "core/host_device.h"
#include "core/rules/hyper.h"

namespace steadygrad {

inline constexpr NumberField kAsgdNumbers[] = {{"lr", &RuleHyper::lr},
                                               {"lambd", &RuleHyper::lambd, -INFINITY},
                                               {"alpha", &RuleHyper::alpha, -INFINITY},
                                               {"t0", &RuleHyper::t0, -INFINITY},
                                               {"weight_decay", &RuleHyper::weight_decay}};
inline constexpr FlagField kAsgdFlags[] = {{"maximize", &RuleHyper::maximize}};
inline constexpr StateField kAsgdStates[] = {{"ax"}};
inline constexpr const char* kAsgdStateNumbers[] = {"eta", "mu"};

template <class T, bool kDecay>
struct Asgd {
  static constexpr int kStateCount = 1;

  T direction, weight_decay, kept, eta, mu;

  Asgd() = default;
  STEADYGRAD_INLINE Asgd(const RuleHyper& hyper, const StepScalars& scalars)
      : direction(T(hyper.maximize ? -1 : 1)),
        weight_decay(T(hyper.weight_decay)),
        kept(T(1 - hyper.lambd * scalars.step_size)),
        eta(T(scalars.step_size)),
        mu(T(scalars.weight)) {}

  STEADYGRAD_INLINE void operator()(T& param, T grad, T& ax, T&, T&) const {
    grad = direction * grad;
    if (kDecay) grad = grad + weight_decay * param;
    param = param * kept - eta * grad;
    ax = mu == T(1) ? param : ax + mu * (param - ax);
  }
};

struct AsgdRule {
  static constexpr RuleKind kKind = RuleKind::asgd;
  static constexpr std::string_view kName = "asgd";
  static constexpr bool kHasStep = true;
  static constexpr FieldList<NumberField> kNumbers = kAsgdNumbers;
  static constexpr FieldList<FlagField> kFlags = kAsgdFlags;
  static constexpr FieldList<StateField> kStates = kAsgdStates;
  static constexpr FieldList<const char*> kStateNumbers = kAsgdStateNumbers;
  // The functor with all terms.
  template <class T>
  using Full = Asgd<T, true>;

  STEADYGRAD_INLINE static int state_count(const RuleHyper&) { return 1; }

  STEADYGRAD_INLINE static StepScalars scalars(const RuleHyper& hyper, double step, const double* numbers) {
    StepScalars scalars;
    scalars.step_size = numbers[0];
    scalars.weight = numbers[1];
    scalars.numbers[0] = hyper.lr / std::pow(1 + hyper.lambd * hyper.lr * step, hyper.alpha);
    scalars.numbers[1] = 1 / (step - hyper.t0 > 1 ? step - hyper.t0 : 1);
    return scalars;
  }

  template <class T, bool kDecay, class Function>
  STEADYGRAD_INLINE static void with_type(const RuleTerms&, Function function) {
    function(RuleType<Asgd<T, kDecay>>{});
  }
};

}  // namespace steadygrad
