#include "sanitize/step.h"

#include <algorithm>

#include "core/backend.h"
#include "core/rules/table.h"
#include "sanitize/memory.h"
#include "sanitize/report.h"

namespace steadygrad::sanitize {
namespace {

const RuleEntry& entry_of(RuleKind kind) {
  return *std::find_if(kRules.begin(), kRules.end(),
                       [&](const RuleEntry& rule) { return rule.kind == kind; });
}

// One number of every tensor's state, in both types that torch has.
class Numbers {
 public:
  Numbers(size_t count, double first) : float32_(count), float64_(count) {
    for (size_t t = 0; t < count; ++t) {
      *float32_[t].get() = static_cast<float>(first + t % 2);
      *float64_[t].get() = first + static_cast<double>(t % 2);
    }
  }

  Number of(size_t t) const {
    if (t % 3 == 0) return {float64_[t].get(), DType::float64};
    return {float32_[t].get(), DType::float32};
  }

  std::string difference_from(const Numbers& emulated) const {
    for (size_t t = 0; t < float32_.size(); ++t) {
      const std::string name = "number of the state " + std::to_string(t);
      std::string problem = difference(name, float32_[t].value(), emulated.float32_[t].value());
      if (problem.empty()) problem = difference(name, float64_[t].value(), emulated.float64_[t].value());
      if (!problem.empty()) return problem;
    }
    return "";
  }

 private:
  std::vector<Single<float>> float32_;
  std::vector<Single<double>> float64_;
};

// The numbers of a rule's states, as far as it has them.
class Counters {
 public:
  Counters(size_t count, const RuleEntry& rule) : rule_(rule), step_(count, 0) {
    for (size_t i = 0; i < rule.number_count(); ++i) numbers_.emplace_back(count, 0.5);
  }

  StepCounter of(size_t t) const {
    StepCounter counter;
    if (rule_.has_step) counter.step = step_.of(t);
    for (size_t i = 0; i + 1 < rule_.number_count(); ++i) counter.numbers[i] = numbers_[i].of(t);
    return counter;
  }

  std::string difference_from(const Counters& emulated) const {
    std::string problem = step_.difference_from(emulated.step_);
    for (size_t i = 0; i < numbers_.size() && problem.empty(); ++i) {
      problem = numbers_[i].difference_from(emulated.numbers_[i]);
    }
    return problem;
  }

 private:
  const RuleEntry& rule_;
  Numbers step_;
  std::vector<Numbers> numbers_;
};

// One array in a block of its own.
template <class T>
Block array_of(size_t count, T value) {
  Block block(static_cast<int64_t>(count * sizeof(T)));
  std::fill_n(block.as<T>(), count, value);
  return block;
}

std::vector<GroupOptions> groups_of(const StepCase& step_case) {
  int32_t count = 1;
  for (const TensorSpec& tensor : step_case.specs.tensors) count = std::max(count, tensor.group + 2);
  std::vector<GroupOptions> groups;
  for (int32_t g = 0; g < count; ++g) {
    GroupOptions& group = groups.emplace_back(step_case.group);
    group.hyper = step_case.rule.hyper;
    group.hyper.lr *= 1 + 0.25 * g;
    group.max_norm /= 1 + g;
  }
  return groups;
}

// A part of a list, by index.
template <class T>
std::vector<T> chosen_of(const std::vector<T>& all, const std::vector<int32_t>& chosen) {
  std::vector<T> part;
  for (const int32_t t : chosen) part.push_back(all[t]);
  return part;
}

// A backend's policies, each with rows of its own.
struct Learnt {
  Learnt(const Policies& given, int64_t scopes)
      : policies(given),
        clip(array_of<double>(scopes * row_size(given.clip), 0.0)),
        skip(array_of<double>(row_size(given.skip), 0.0)) {
    if (given.clip.kind != PolicyKind::none) policies.clip_rows = clip.as<double>();
    if (given.skip.window > 0) policies.skip_row = skip.as<double>();
    if (given.clip.kind != PolicyKind::percentile) return;
    const int64_t window = given.clip.window;
    for (int64_t scope = 0; scope < scopes; ++scope) {
      double* const row = clip.as<double>() + scope * row_size(given.clip);
      row[kCount] = static_cast<double>(window);
      for (int64_t i = 0; i < window; ++i) {
        row[kNorms + i] = static_cast<double>(window - i) / 16;
        row[kNorms + window + i] = static_cast<double>(i + 1) / 16;
      }
    }
  }
  Learnt(const Learnt&) = delete;
  Learnt& operator=(const Learnt&) = delete;

  Policies policies;
  Block clip;
  Block skip;
};

// Where a backend records its steps; short, so that it comes round.
struct Ring {
  explicit Ring(size_t parameters) : recorded(array_of<int64_t>(1, 0)) {
    telemetry.history = 3;
    telemetry.parameters = static_cast<int64_t>(parameters);
    rows = array_of<double>(telemetry.history * row_size(telemetry), 0.0);
    telemetry.rows = rows.as<double>();
    telemetry.recorded = recorded.as<int64_t>();
  }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  std::string difference_from(const Ring& emulated) const {
    std::string problem =
        difference_of_counts("recorded steps", *telemetry.recorded, *emulated.telemetry.recorded);
    for (int64_t i = 0; i < telemetry.history * row_size(telemetry) && problem.empty(); ++i) {
      problem = difference("record " + std::to_string(i), telemetry.rows[i], emulated.telemetry.rows[i]);
    }
    return problem;
  }

  Telemetry telemetry;
  Block rows{0};
  Block recorded;
};

std::string difference_in_learnt(const Block& cpu, const Block& emulated) {
  for (int64_t i = 0; i < cpu.bytes() / static_cast<int64_t>(sizeof(double)); ++i) {
    const std::string problem =
        difference("state " + std::to_string(i), cpu.as<double>()[i], emulated.as<double>()[i]);
    if (!problem.empty()) return problem;
  }
  return "";
}

class Comparison {
 public:
  explicit Comparison(const StepCase& step_case)
      : case_(step_case),
        options_(step_case.options),
        groups_(groups_of(step_case)),
        uses_{true, true, state_count(step_case.rule.kind, step_case.rule.hyper), true,
              keeps_extra(step_case.options.rounding)},
        count_(step_case.specs.tensors.size()),
        cpu_(step_case.specs, uses_, Values::ordinary),
        emulated_(step_case.specs, uses_, Values::ordinary),
        cpu_counters_(count_, entry_of(step_case.rule.kind)),
        emulated_counters_(count_, entry_of(step_case.rule.kind)),
        cpu_taken_(array_of<int32_t>(count_, 0)),
        cpu_counts_(array_of<int64_t>(2, 0)),
        taken_(array_of<int32_t>(count_, 0)),
        counts_(array_of<int64_t>(2, 0)),
        rounded_steps_(array_of<uint64_t>(1, 0)),
        cpu_learnt_(step_case.policies, scopes()),
        emulated_learnt_(step_case.policies, scopes()),
        cpu_ring_(count_),
        emulated_ring_(count_) {
    options_.rule = step_case.rule.kind;
  }

  // Rows of what a backend has, which meets its own likeness.
  struct Rows {
    Rows(const StepOptions& options, size_t groups, size_t slots, bool per_tensor)
        : type(options.norm_type),
          count(1 + groups + (per_tensor ? slots : 0)),
          rows(static_cast<int64_t>(count * sizeof(ScopeSums))),
          counted(array_of<int32_t>(slots, 1)) {
      for (size_t s = 0; s < slots; s += 3) counted.as<int32_t>()[s] = 0;
      reduction.rows = rows.as<ScopeSums>();
      reduction.counted = counted.as<int32_t>();
      reduction.slots = static_cast<int32_t>(slots);
      reduction.per_tensor = per_tensor;
      reduction.reduce = [this] {
        for (size_t r = 0; r < count; ++r) {
          const ScopeSums other = reduction.rows[r];
          combine(type, reduction.rows[r], other);
        }
      };
    }
    Rows(const Rows&) = delete;
    Rows& operator=(const Rows&) = delete;

    NormType type;
    size_t count;
    Block rows;
    Block counted;
    Reduction reduction;
  };

  std::string step(size_t number) {
    const uint64_t seed = 100 + number;
    cpu_.renew_gradients(case_.gradients[number], seed);
    emulated_.renew_gradients(case_.gradients[number], seed);
    std::vector<int32_t> chosen;
    for (size_t t = 0; t < count_; ++t) {
      const bool absent = case_.tensors_come_and_go && number % 2 == 1 && t % 4 == 2;
      if (!absent) chosen.push_back(static_cast<int32_t>(t));
    }
    records_ = number % 2 == 0;
    const int64_t bytes = static_cast<int64_t>(chosen.size() * sizeof(int64_t));
    const Single<Outcome> outcome;
    const Block counted(bytes);
    step_on_cpu(chosen, outcome.get(), counted.as<int64_t>());
    const Single<Outcome> emulated;
    const Block nonfinite(bytes);
    step_emulated(chosen, emulated.get(), nonfinite.as<int64_t>());
    std::string problem = difference_in_outcomes(outcome.value(), emulated.value(), counted.as<int64_t>(),
                                                 nonfinite.as<int64_t>(), chosen.size());
    if (problem.empty()) problem = cpu_.difference_from(emulated_);
    if (problem.empty()) problem = cpu_counters_.difference_from(emulated_counters_);
    if (problem.empty()) problem = difference_in_learnt(cpu_learnt_.clip, emulated_learnt_.clip);
    if (problem.empty()) problem = difference_in_learnt(cpu_learnt_.skip, emulated_learnt_.skip);
    if (problem.empty()) problem = cpu_ring_.difference_from(emulated_ring_);
    return problem.empty() ? "" : "step " + std::to_string(number + 1) + ", " + problem;
  }

 private:
  int64_t scopes() const {
    return scope_of(options_.clip_scope, static_cast<int32_t>(groups_.size()) - 1,
                    static_cast<int32_t>(count_) - 1) +
           1;
  }

  bool per_tensor() const { return options_.clip_scope == ClipScope::tensor || records_; }

  void step_on_cpu(const std::vector<int32_t>& chosen, Outcome* outcome, int64_t* nonfinite) {
    std::vector<StepCounter> counters;
    for (const int32_t t : chosen) counters.push_back(cpu_counters_.of(t));
    Rows rows(options_, groups_.size(), count_, per_tensor());
    if (!case_.two_processes) rows.reduction = Reduction();
    StepMemory memory;
    memory.output.outcome = outcome;
    memory.counts = cpu_counts_.as<int64_t>();
    memory.taken = cpu_taken_.as<int32_t>();
    memory.nonfinite = nonfinite;
    memory.policies = cpu_learnt_.policies;
    if (records_) memory.telemetry = cpu_ring_.telemetry;
    cpu_backend().step(
        placed(cpu_, chosen), counters, groups_, options_, memory, rows.reduction, [](bool) {}, table_,
        nullptr, Stream());
    options_.rounded_steps += outcome->skipped != 0 || outcome->refused != 0 ? 0 : 1;
  }

  // Those of the tensors that take part, with their places among all.
  static Tensors placed(const TensorSet& set, const std::vector<int32_t>& chosen) {
    Tensors tensors = chosen_of(set.operands(), chosen);
    for (size_t t = 0; t < chosen.size(); ++t) tensors[t].place = chosen[t];
    return tensors;
  }

  void step_emulated(const std::vector<int32_t>& chosen, Outcome* outcome, int64_t* nonfinite) {
    std::vector<StepCounter> counters;
    for (const int32_t t : chosen) counters.push_back(emulated_counters_.of(t));
    StepOptions options = options_;
    const Single<float> scale(static_cast<float>(1 / options.unscale));
    const Single<float> found_inf(options.found_inf ? 2.0F : 0.0F);
    StepMemory memory;
    memory.output.outcome = outcome;
    memory.counts = counts_.as<int64_t>();
    memory.taken = taken_.as<int32_t>();
    memory.nonfinite = nonfinite;
    memory.rounded_steps = rounded_steps_.as<uint64_t>();
    memory.policies = emulated_learnt_.policies;
    if (records_) memory.telemetry = emulated_ring_.telemetry;
    std::vector<Single<double>> learning_rates(groups_.size());
    std::vector<GroupOptions> groups = groups_;
    for (size_t g = 0; g < groups_.size() && case_.numbers_on_device; ++g) {
      *learning_rates[g].get() = groups_[g].hyper.lr;
      groups[g].hyper.lr = 0;
      groups[g].lr = {learning_rates[g].get(), DType::float64};
    }
    if (case_.numbers_on_device) {
      memory.grad_scale = scale.get();
      memory.found_inf = found_inf.get();
      options.unscale = 1;
      options.found_inf = false;
    }
    Rows rows(options, groups_.size(), count_, per_tensor());
    if (!case_.two_processes) rows.reduction = Reduction();
    cuda_backend().step(
        placed(emulated_, chosen), counters, groups, options, memory, rows.reduction, [](bool) {}, table_,
        memory_.allocate(), Stream());
  }

  std::string difference_in_outcomes(const Outcome& outcome, const Outcome& emulated, const int64_t* counted,
                                     const int64_t* nonfinite, size_t tensors) {
    std::vector<std::string> problems = {
        difference("norm", outcome.norm, emulated.norm),
        difference("fp32 norm", outcome.norm_float32, emulated.norm_float32),
        difference_of_counts("nonfinite", outcome.nonfinite, emulated.nonfinite),
        difference_of_counts("skipped", outcome.skipped, emulated.skipped),
        difference_of_counts("spiked", outcome.spiked, emulated.spiked),
        difference_of_counts("refused", outcome.refused, emulated.refused),
        difference_of_counts("clipped", outcome.clipped, emulated.clipped),
        difference_of_counts("skipped steps", cpu_counts_.as<int64_t>()[0], counts_.as<int64_t>()[0]),
        difference_of_counts("clipped steps", cpu_counts_.as<int64_t>()[1], counts_.as<int64_t>()[1]),
        difference_of_counts("rounded steps", static_cast<int64_t>(options_.rounded_steps),
                             static_cast<int64_t>(*rounded_steps_.as<uint64_t>())),
    };
    for (size_t t = 0; t < tensors; ++t) {
      problems.push_back(
          difference_of_counts("nonfinite of tensor " + std::to_string(t), counted[t], nonfinite[t]));
    }
    for (size_t t = 0; t < count_; ++t) {
      problems.push_back(difference_of_counts("steps taken, slot " + std::to_string(t),
                                              cpu_taken_.as<int32_t>()[t], taken_.as<int32_t>()[t]));
    }
    for (const std::string& problem : problems) {
      if (!problem.empty()) return problem;
    }
    return "";
  }

  const StepCase& case_;
  StepOptions options_;
  std::vector<GroupOptions> groups_;
  Uses uses_;
  size_t count_;
  TensorSet cpu_;
  TensorSet emulated_;
  Counters cpu_counters_;
  Counters emulated_counters_;
  Block cpu_taken_;
  Block cpu_counts_;
  Block taken_;
  Block counts_;
  Block rounded_steps_;
  Learnt cpu_learnt_;
  Learnt emulated_learnt_;
  Ring cpu_ring_;
  Ring emulated_ring_;
  bool records_ = false;
  StepTable table_;
  DeviceMemory memory_;
};

}  // namespace

std::string compare_steps(const StepCase& step_case) {
  Comparison comparison(step_case);
  for (size_t number = 0; number < step_case.gradients.size(); ++number) {
    const std::string problem = comparison.step(number);
    if (!problem.empty()) return problem;
  }
  return "";
}

}  // namespace steadygrad::sanitize
