// torch.optim.SGD for one element.
#pragma once

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

}  // namespace steadygrad
