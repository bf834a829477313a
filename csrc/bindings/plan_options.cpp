#include "bindings/plan_options.h"

#include <iterator>
#include <string>
#include <utility>

namespace steadygrad::bindings {
namespace {

GroupOptions group_options(const py::handle& numbers) {
  const auto sequence = py::reinterpret_borrow<py::tuple>(numbers);
  if (!py::isinstance<py::tuple>(numbers) || sequence.size() != std::size(kGroupFields)) {
    throw py::value_error("step: groups: expected a tuple of " + std::to_string(std::size(kGroupFields)) +
                          " numbers");
  }
  size_t next = 0;
  const auto number = [&] {
    const double value = PyFloat_AsDouble(PyTuple_GET_ITEM(sequence.ptr(), next++));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  };
  GroupOptions group;
  RuleHyper& hyper = group.hyper;
  for (double* field :
       {&hyper.lr, &hyper.weight_decay, &hyper.momentum, &hyper.dampening, &hyper.beta1, &hyper.beta2,
        &hyper.eps, &hyper.alpha, &hyper.lr_decay, &hyper.rho, &hyper.lambd, &hyper.t0, &hyper.momentum_decay,
        &hyper.etaminus, &hyper.etaplus, &hyper.step_size_min, &hyper.step_size_max}) {
    *field = number();
  }
  for (bool* field :
       {&hyper.nesterov, &hyper.maximize, &hyper.amsgrad, &hyper.centered, &hyper.decoupled_weight_decay}) {
    *field = number() != 0;
  }
  for (double* field : {&group.max_norm, &group.clip_value, &group.l1, &group.l2, &group.clipping})
    *field = number();
  return group;
}

template <class Value>
Value one_of(const py::dict& options, const char* key,
             const std::vector<std::pair<const char*, Value>>& choices) {
  const std::string name = py::str(options[key]);
  for (const auto& [choice, value] : choices) {
    if (name == choice) return value;
  }
  throw py::value_error("Plan: unknown " + std::string(key) + ": " + name);
}

}  // namespace

std::vector<GroupOptions> group_options_of(const py::list& groups, size_t expected) {
  if (groups.size() != expected) throw py::value_error("step: groups: expected one entry per param group");
  std::vector<GroupOptions> list;
  for (const py::handle group : groups) list.push_back(group_options(group));
  return list;
}

const RuleEntry* rule_named(const std::string& name) {
  for (const RuleEntry& entry : kRules) {
    if (entry.name == name) return &entry;
  }
  throw py::value_error("Plan: rule: expected the name of an update rule, got " + name);
}

StepOptions step_options(const RuleEntry& rule, const py::dict& options) {
  StepOptions step;
  step.rule = rule.kind;
  step.norm_type = norm_type(options["norm_type"].cast<double>());
  step.clip_scope = one_of<ClipScope>(
      options, "clip_scope",
      {{"global", ClipScope::global}, {"group", ClipScope::group}, {"tensor", ClipScope::tensor}});
  step.nonfinite = one_of<NonfinitePolicy>(options, "nonfinite",
                                           {{"skip", NonfinitePolicy::skip},
                                            {"zero", NonfinitePolicy::zero},
                                            {"raise", NonfinitePolicy::raise},
                                            {"propagate", NonfinitePolicy::propagate}});
  step.penalty_before_clip =
      one_of<bool>(options, "penalty_order", {{"before_clip", true}, {"after_clip", false}});
  step.proximal = one_of<bool>(options, "l1_mode", {{"subgradient", false}, {"proximal", true}});
  step.write_grads = options["write_grads"].cast<bool>();
  step.rounding = one_of<Rounding>(options, "rounding",
                                   {{"nearest", Rounding::nearest},
                                    {"stochastic", Rounding::stochastic},
                                    {"kahan", Rounding::kahan},
                                    {"master", Rounding::master}});
  step.rounding_seed = options["rounding_seed"].cast<uint64_t>();
  return step;
}

namespace {

int64_t checked_window(const char* policy, const py::object& number, int64_t least) {
  const auto window = number.cast<int64_t>();
  // Rows of that many numbers have a size that is a number too.
  if (window >= least && window <= int64_t{1} << 40) return window;
  throw py::value_error("Plan: " + std::string(policy) + ": expected a window of at least " +
                        std::to_string(least) + ", got " + std::to_string(window));
}

}  // namespace

Policies policies_of(const py::dict& options) {
  Policies policies;
  if (options.contains("clip_policy") && !options["clip_policy"].is_none()) {
    const auto numbers = options["clip_policy"].cast<py::tuple>();
    ClipPolicy& clip = policies.clip;
    clip.kind = one_of<PolicyKind>(py::dict(py::arg("clip_policy") = numbers[0]), "clip_policy",
                                   {{"percentile", PolicyKind::percentile},
                                    {"zscore", PolicyKind::zscore},
                                    {"relative", PolicyKind::relative},
                                    {"damp", PolicyKind::damp},
                                    {"given", PolicyKind::given},
                                    {"adaptive", PolicyKind::adaptive}});
    size_t next = 1;
    for (double* field : {&clip.max_norm, &clip.level, &clip.decay, &clip.factor}) {
      *field = numbers[next++].cast<double>();
    }
    clip.warmup = numbers[next++].cast<int64_t>();
    clip.window = checked_window("clip_policy", numbers[next++], clip.kind == PolicyKind::percentile ? 1 : 0);
  }
  if (options.contains("skip_policy") && !options["skip_policy"].is_none()) {
    const auto numbers = options["skip_policy"].cast<py::tuple>();
    policies.skip.sigma = numbers[0].cast<double>();
    policies.skip.window = checked_window("skip_policy", numbers[1], 2);
  }
  return policies;
}

Policies with_rows(Policies policies, const py::object& rows, int64_t scopes, Device& device) {
  if (rows.is_none()) return policies;
  const auto pair = rows.cast<py::tuple>();
  const auto memory = [&](size_t i, const char* name, int64_t numel) {
    const py::object tensor = pair[i];
    if (tensor.is_none()) return static_cast<double*>(nullptr);
    return static_cast<double*>(
        vector_of(tensor.ptr(), {"step", name, -1}, {kDLFloat, 64, 1}, numel, device));
  };
  if (policies.clip.kind != PolicyKind::none) {
    policies.clip_rows = memory(0, "clip state", scopes * row_size(policies.clip));
  }
  if (policies.skip.window > 0) policies.skip_row = memory(1, "skip state", row_size(policies.skip));
  return policies;
}

Telemetry telemetry_of(const py::object& telemetry, size_t parameters, Device& device) {
  Telemetry memory;
  if (telemetry.is_none()) return memory;
  const auto parts = telemetry.cast<py::tuple>();
  memory.history = parts[2].cast<int64_t>();
  memory.parameters = parts[3].cast<bool>() ? static_cast<int64_t>(parameters) : 0;
  if (memory.history < 1) throw py::value_error("step: telemetry: expected at least one row");
  const auto vector = [&](size_t i, DLDataTypeCode code, int64_t numel) {
    const py::object tensor = parts[i];
    return vector_of(tensor.ptr(), {"step", "telemetry", -1}, {static_cast<uint8_t>(code), 64, 1}, numel,
                     device);
  };
  memory.rows = static_cast<double*>(vector(0, kDLFloat, memory.history * row_size(memory)));
  memory.recorded = static_cast<int64_t*>(vector(1, kDLInt, 1));
  return memory;
}

}  // namespace steadygrad::bindings
