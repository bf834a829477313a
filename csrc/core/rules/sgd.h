// torch.optim.SGD for one element.
#pragma once

#include "core/host_device.h"
#include "core/rules/hyper.h"

namespace steadygrad {

template <class T, bool kMomentum>
struct Sgd {
  static constexpr int kStateCount = kMomentum ? 1 : 0;

  T lr, weight_decay, momentum, undamped;
  bool nesterov, maximize, first;

  STEADYGRAD_INLINE Sgd(const RuleHyper& hyper, const StepScalars& scalars)
      : lr(T(hyper.lr)),
        weight_decay(T(hyper.weight_decay)),
        momentum(T(hyper.momentum)),
        undamped(T(1 - hyper.dampening)),
        nesterov(hyper.nesterov),
        maximize(hyper.maximize),
        first(scalars.first) {}

  STEADYGRAD_INLINE void operator()(T& param, T grad, T& momentum_buffer, T&, T&) const {
    grad = maximize ? -grad : grad;
    grad = weight_decay != T(0) ? grad + weight_decay * param : grad;
    if (kMomentum) {
      const T buffer = first ? grad : momentum_buffer * momentum + undamped * grad;
      momentum_buffer = buffer;
      grad = nesterov ? grad + momentum * buffer : buffer;
    }
    param = param - lr * grad;
  }
};

}  // namespace steadygrad
