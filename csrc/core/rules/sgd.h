// torch.optim.SGD for one element.
#pragma once

#include <string_view>

#include "core/host_device.h"
#include "core/rules/hyper.h"

namespace steadygrad {

inline constexpr NumberField kSgdNumbers[] = {{"lr", &RuleHyper::lr},
                                              {"momentum", &RuleHyper::momentum},
                                              {"dampening", &RuleHyper::dampening, -INFINITY},
                                              {"weight_decay", &RuleHyper::weight_decay}};
inline constexpr FlagField kSgdFlags[] = {{"nesterov", &RuleHyper::nesterov},
                                          {"maximize", &RuleHyper::maximize}};
inline constexpr StateField kSgdStates[] = {{"momentum_buffer", has_momentum}};

template <class T, bool kDecay, bool kMomentum, bool kNesterov>
struct Sgd {
  static constexpr int kStateCount = kMomentum ? 1 : 0;

  T direction, lr, weight_decay, momentum, kept, added;

  Sgd() = default;
  STEADYGRAD_INLINE Sgd(const RuleHyper& hyper, const StepScalars& scalars)
      : direction(T(hyper.maximize ? -1 : 1)),
        lr(T(hyper.lr)),
        weight_decay(T(hyper.weight_decay)),
        momentum(T(hyper.momentum)),
        kept(T(scalars.first ? 0 : hyper.momentum)),
        added(T(scalars.first ? 1 : 1 - hyper.dampening)) {}

  STEADYGRAD_INLINE void operator()(T& param, T grad, T& momentum_buffer, T&, T&) const {
    grad = direction * grad;
    if (kDecay) grad = grad + weight_decay * param;
    if (kMomentum) {
      // The first buffer is the gradient itself, undamped.
      momentum_buffer = momentum_buffer * kept + added * grad;
      grad = kNesterov ? grad + momentum * momentum_buffer : momentum_buffer;
    }
    param = param - lr * grad;
  }
};

struct SgdRule {
  static constexpr RuleKind kKind = RuleKind::sgd;
  static constexpr std::string_view kName = "sgd";
  static constexpr bool kHasStep = false;
  static constexpr FieldList<NumberField> kNumbers = kSgdNumbers;
  static constexpr FieldList<FlagField> kFlags = kSgdFlags;
  static constexpr FieldList<StateField> kStates = kSgdStates;
  static constexpr FieldList<const char*> kStateNumbers = {};
  // The functor with all terms.
  template <class T>
  using Full = Sgd<T, true, true, true>;

  STEADYGRAD_INLINE static int state_count(const RuleHyper& hyper) { return hyper.momentum != 0 ? 1 : 0; }

  STEADYGRAD_INLINE static StepScalars scalars(const RuleHyper&, double, const double*) { return {}; }

  template <class T, bool kDecay, class Function>
  STEADYGRAD_INLINE static void with_type(const RuleTerms& terms, Function function) {
    if (terms.momentum && terms.nesterov) return function(RuleType<Sgd<T, kDecay, true, true>>{});
    if (terms.momentum) return function(RuleType<Sgd<T, kDecay, true, false>>{});
    function(RuleType<Sgd<T, kDecay, false, false>>{});
  }
};

}  // namespace steadygrad
