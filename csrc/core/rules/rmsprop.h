// torch.optim.RMSprop for one element.
#pragma once

#include <cmath>
#include <string_view>

#include "core/host_device.h"
#include "core/rules/division.h"
#include "core/rules/hyper.h"

namespace steadygrad {

inline constexpr NumberField kRmsPropNumbers[] = {{"lr", &RuleHyper::lr},
                                                  {"alpha", &RuleHyper::alpha},
                                                  {"eps", &RuleHyper::eps},
                                                  {"weight_decay", &RuleHyper::weight_decay},
                                                  {"momentum", &RuleHyper::momentum}};
inline constexpr FlagField kRmsPropFlags[] = {{"centered", &RuleHyper::centered},
                                              {"maximize", &RuleHyper::maximize}};
inline bool is_centered(const RuleHyper& hyper) { return hyper.centered; }
inline constexpr StateField kRmsPropStates[] = {
    {"square_avg"}, {"grad_avg", is_centered}, {"momentum_buffer", has_momentum}};

template <class T, bool kDecay, bool kCentered, bool kMomentum>
struct RmsProp {
  static constexpr int kStateCount = 1 + (kCentered ? 1 : 0) + (kMomentum ? 1 : 0);

  T direction, lr, weight_decay, alpha, one_minus_alpha, eps, momentum;

  RmsProp() = default;
  STEADYGRAD_INLINE RmsProp(const RuleHyper& hyper, const StepScalars&)
      : direction(T(hyper.maximize ? -1 : 1)),
        lr(T(hyper.lr)),
        weight_decay(T(hyper.weight_decay)),
        alpha(T(hyper.alpha)),
        one_minus_alpha(T(1 - hyper.alpha)),
        eps(T(hyper.eps)),
        momentum(T(hyper.momentum)) {}

  STEADYGRAD_INLINE void operator()(T& param, T grad, T& square_avg, T& second, T& third) const {
    grad = direction * grad;
    if (kDecay) grad = grad + weight_decay * param;
    square_avg = square_avg * alpha + one_minus_alpha * grad * grad;
    T variance = square_avg;
    if (kCentered) {
      T& grad_avg = second;
      grad_avg = grad_avg * alpha + one_minus_alpha * grad;
      variance = variance - grad_avg * grad_avg;
    }
    const T update = quotient(grad, square_root(variance) + eps);
    if (kMomentum) {
      T& momentum_buffer = kCentered ? third : second;
      momentum_buffer = momentum_buffer * momentum + update;
      param = param - lr * momentum_buffer;
    } else {
      param = param - lr * update;
    }
  }
};

struct RmsPropRule {
  static constexpr RuleKind kKind = RuleKind::rmsprop;
  static constexpr std::string_view kName = "rmsprop";
  static constexpr bool kHasStep = true;
  static constexpr FieldList<NumberField> kNumbers = kRmsPropNumbers;
  static constexpr FieldList<FlagField> kFlags = kRmsPropFlags;
  static constexpr FieldList<StateField> kStates = kRmsPropStates;
  static constexpr FieldList<const char*> kStateNumbers = {};
  // The functor with all terms.
  template <class T>
  using Full = RmsProp<T, true, true, true>;

  STEADYGRAD_INLINE static int state_count(const RuleHyper& hyper) {
    return 1 + (hyper.centered ? 1 : 0) + (hyper.momentum != 0 ? 1 : 0);
  }

  STEADYGRAD_INLINE static StepScalars scalars(const RuleHyper&, double, const double*) { return {}; }

  template <class T, bool kDecay, class Function>
  STEADYGRAD_INLINE static void with_type(const RuleTerms& terms, Function function) {
    if (terms.centered && terms.momentum) return function(RuleType<RmsProp<T, kDecay, true, true>>{});
    if (terms.centered) return function(RuleType<RmsProp<T, kDecay, true, false>>{});
    if (terms.momentum) return function(RuleType<RmsProp<T, kDecay, false, true>>{});
    function(RuleType<RmsProp<T, kDecay, false, false>>{});
  }
};

}  // namespace steadygrad
