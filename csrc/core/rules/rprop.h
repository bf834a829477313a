// torch.optim.Rprop for one element.
#pragma once

#include <string_view>

#include "core/host_device.h"
#include "core/rules/hyper.h"

namespace steadygrad {

inline constexpr NumberField kRpropNumbers[] = {{"lr", &RuleHyper::lr},
                                                {"etas", &RuleHyper::etaminus, 0, INFINITY, 0},
                                                {"etas", &RuleHyper::etaplus, 0, INFINITY, 1},
                                                {"step_sizes", &RuleHyper::step_size_min, 0, INFINITY, 0},
                                                {"step_sizes", &RuleHyper::step_size_max, 0, INFINITY, 1}};
inline constexpr FlagField kRpropFlags[] = {{"maximize", &RuleHyper::maximize}};
inline constexpr StateField kRpropStates[] = {{"prev"}, {"step_size"}};

template <class T>
struct Rprop {
  static constexpr int kStateCount = 2;

  T direction, etaminus, etaplus, step_size_min, step_size_max;

  Rprop() = default;
  STEADYGRAD_INLINE Rprop(const RuleHyper& hyper, const StepScalars&)
      : direction(T(hyper.maximize ? -1 : 1)),
        etaminus(T(hyper.etaminus)),
        etaplus(T(hyper.etaplus)),
        step_size_min(T(hyper.step_size_min)),
        step_size_max(T(hyper.step_size_max)) {}

  STEADYGRAD_INLINE void operator()(T& param, T grad, T& prev, T& step_size, T&) const {
    grad = direction * grad;
    const T product = grad * prev;
    const T size = step_size * (product > T(0) ? etaplus : product < T(0) ? etaminus : T(1));
    // NaN is kept, as in torch.
    step_size = size < step_size_min ? step_size_min : size > step_size_max ? step_size_max : size;
    // After a change of sign the parameter stays as it is for one step.
    prev = product < T(0) ? T(0) : grad;
    param = param - (prev > T(0) ? step_size : prev < T(0) ? -step_size : T(0));
  }
};

struct RpropRule {
  static constexpr RuleKind kKind = RuleKind::rprop;
  static constexpr std::string_view kName = "rprop";
  static constexpr bool kHasStep = true;
  static constexpr FieldList<NumberField> kNumbers = kRpropNumbers;
  static constexpr FieldList<FlagField> kFlags = kRpropFlags;
  static constexpr FieldList<StateField> kStates = kRpropStates;
  static constexpr FieldList<const char*> kStateNumbers = {};
  // The functor with all terms.
  template <class T>
  using Full = Rprop<T>;

  STEADYGRAD_INLINE static int state_count(const RuleHyper&) { return 2; }

  STEADYGRAD_INLINE static StepScalars scalars(const RuleHyper&, double, const double*) { return {}; }

  template <class T, bool kDecay, class Function>
  STEADYGRAD_INLINE static void with_type(const RuleTerms&, Function function) {
    function(RuleType<Rprop<T>>{});
  }
};

}  // namespace steadygrad
