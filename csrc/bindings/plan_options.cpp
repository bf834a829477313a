#include "bindings/plan_options.h"

#include <string>
#include <utility>

#include <pybind11/stl.h>

namespace steadygrad::bindings {
namespace {

template <class Value>
Value named_one(const char* key, const std::string& name,
                const std::vector<std::pair<const char*, Value>>& choices) {
  for (const auto& [choice, value] : choices) {
    if (name == choice) return value;
  }
  throw py::value_error("Plan: unknown " + std::string(key) + ": " + name);
}

template <class Value>
Value one_of(const py::dict& options, const char* key,
             const std::vector<std::pair<const char*, Value>>& choices) {
  return named_one<Value>(key, py::str(options[key]), choices);
}

}  // namespace

StepOptions step_options(RuleKind rule, const py::dict& options) {
  StepOptions step;
  step.rule = rule;
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
  // The bound keeps the size of the rows within 64 bits.
  if (window >= least && window <= int64_t{1} << 40) return window;
  throw py::value_error("Plan: " + std::string(policy) + ": expected a window of at least " +
                        std::to_string(least) + ", got " + std::to_string(window));
}

ClipPolicy clip_policy(const std::string& kind, double max_norm, double level, double decay, double factor,
                       int64_t warmup, const py::object& window) {
  ClipPolicy clip;
  clip.kind = named_one<PolicyKind>("clip_policy", kind,
                                    {{"percentile", PolicyKind::percentile},
                                     {"zscore", PolicyKind::zscore},
                                     {"relative", PolicyKind::relative},
                                     {"damp", PolicyKind::damp},
                                     {"given", PolicyKind::given},
                                     {"adaptive", PolicyKind::adaptive}});
  clip.max_norm = max_norm;
  clip.level = level;
  clip.decay = decay;
  clip.factor = factor;
  clip.warmup = warmup;
  clip.window = checked_window("clip_policy", window, clip.kind == PolicyKind::percentile ? 1 : 0);
  return clip;
}

SpikePolicy spike_policy(double sigma, const py::object& window) {
  return {sigma, checked_window("skip_policy", window, 2)};
}

}  // namespace

Policies policies_of(const py::dict& options) {
  Policies policies;
  const auto given = [&](const char* key) {
    return options.contains(key) ? py::object(options[key]) : py::object(py::none());
  };
  const py::object clip = given("clip_policy");
  const py::object skip = given("skip_policy");
  if (!clip.is_none()) policies.clip = clip.cast<ClipPolicy>();
  if (!skip.is_none()) policies.skip = skip.cast<SpikePolicy>();
  return policies;
}

Policies with_rows(Policies policies, const py::object& clip_rows, const py::object& skip_row, int64_t scopes,
                   Device& device) {
  const auto memory = [&](const py::object& rows, const char* name, int64_t numel) {
    return memory_of<double>(rows, {"step", name, -1}, {kDLFloat, 64, 1}, numel, device);
  };
  if (policies.clip.kind != PolicyKind::none) {
    policies.clip_rows = memory(clip_rows, "clip state", scopes * row_size(policies.clip));
  }
  if (policies.skip.window > 0) policies.skip_row = memory(skip_row, "skip state", row_size(policies.skip));
  return policies;
}

Telemetry telemetry_of(const TelemetryMemory* memory, size_t parameters, Device& device) {
  Telemetry telemetry;
  if (memory == nullptr) return telemetry;
  telemetry.history = memory->history;
  telemetry.parameters = memory->per_tensor ? static_cast<int64_t>(parameters) : 0;
  if (telemetry.history < 1) throw py::value_error("step: telemetry: expected at least one row");
  const Argument argument{"step", "telemetry", -1};
  telemetry.rows = memory_of<double>(memory->rows, argument, {kDLFloat, 64, 1},
                                     telemetry.history * row_size(telemetry), device);
  telemetry.recorded = memory_of<int64_t>(memory->recorded, argument, {kDLInt, 64, 1}, 1, device);
  return telemetry;
}

// The classes are local to the module, since the emulated module has the same ones.
void define_plan_options(py::module_& module) {
  const auto local = py::module_local();
  const py::none none;
  py::class_<Slot>(module, "Slot", local)
      .def(py::init([](const py::list& states, const py::list& numbers, py::object extra, bool first) {
             return Slot{states.cast<std::vector<py::object>>(), numbers.cast<std::vector<py::object>>(),
                         std::move(extra), first};
           }),
           py::kw_only(), py::arg("states"), py::arg("numbers"), py::arg("extra"), py::arg("first"))
      .def_readonly("first", &Slot::first);
  py::class_<Scaling>(module, "Scaling", local)
      .def(py::init([](double unscale, bool found_inf, py::object grad_scale, py::object found) {
             return Scaling{unscale, found_inf, std::move(grad_scale), std::move(found)};
           }),
           py::kw_only(), py::arg("unscale") = 1.0, py::arg("found_inf") = false,
           py::arg("grad_scale_tensor") = none, py::arg("found_inf_tensor") = none)
      .def_readonly("unscale", &Scaling::unscale)
      .def_readonly("found_inf", &Scaling::found_inf)
      .def_readonly("grad_scale_tensor", &Scaling::grad_scale_tensor)
      .def_readonly("found_inf_tensor", &Scaling::found_inf_tensor);
  py::class_<DeviceMemory>(module, "DeviceMemory", local)
      .def(py::init([](py::object outcome, py::object taken, py::object counts, py::object nonfinite,
                       py::object rounded_steps, py::object allocate) {
             return DeviceMemory{std::move(outcome),   std::move(taken),         std::move(counts),
                                 std::move(nonfinite), std::move(rounded_steps), std::move(allocate)};
           }),
           py::kw_only(), py::arg("outcome"), py::arg("taken"), py::arg("counts") = none,
           py::arg("nonfinite") = none, py::arg("rounded_steps") = none, py::arg("allocate"));
  py::class_<TelemetryMemory>(module, "Telemetry", local)
      .def(py::init([](py::object rows, py::object recorded, int64_t history, bool per_tensor) {
             return TelemetryMemory{std::move(rows), std::move(recorded), history, per_tensor};
           }),
           py::kw_only(), py::arg("rows"), py::arg("recorded"), py::arg("history"), py::arg("per_tensor"))
      .def_readonly("rows", &TelemetryMemory::rows)
      .def_readonly("recorded", &TelemetryMemory::recorded)
      .def_readonly("history", &TelemetryMemory::history)
      .def_readonly("per_tensor", &TelemetryMemory::per_tensor);
  py::class_<ReductionMemory>(module, "Reduction", local)
      .def(py::init([](py::object rows, py::object counted, py::object reduce, py::object ask_policy) {
             return ReductionMemory{std::move(rows), std::move(counted), std::move(reduce),
                                    std::move(ask_policy)};
           }),
           py::kw_only(), py::arg("rows"), py::arg("counted"), py::arg("reduce") = none,
           py::arg("ask_policy") = none)
      .def_readonly("rows", &ReductionMemory::rows)
      .def_readonly("counted", &ReductionMemory::counted)
      .def_readonly("reduce", &ReductionMemory::reduce)
      .def_readonly("ask_policy", &ReductionMemory::ask_policy);
  py::class_<ClipPolicy>(module, "ClipPolicy", local)
      .def(py::init(&clip_policy), py::arg("kind"), py::kw_only(), py::arg("max_norm") = INFINITY,
           py::arg("level") = 0.0, py::arg("decay") = 0.0, py::arg("factor") = 1.0, py::arg("warmup") = 0,
           py::arg("window") = 0)
      .def_property_readonly("row_size", [](const ClipPolicy& policy) { return row_size(policy); });
  py::class_<SpikePolicy>(module, "SpikePolicy", local)
      .def(py::init(&spike_policy), py::kw_only(), py::arg("sigma"), py::arg("window"))
      .def_property_readonly("row_size", [](const SpikePolicy& policy) { return row_size(policy); });
  // The columns of values in rows of numbers.
  using py::literals::operator""_a;
  module.attr("POLICY_ROW") =
      py::dict("coefficient"_a = kCoefficient, "limit"_a = kLimit, "norm"_a = kGivenNorm, "learnt"_a = kCount,
               "count"_a = kCount, "oldest"_a = kOldest, "norms"_a = kNorms);
  module.attr("TELEMETRY_COLUMNS") =
      py::dict("norm"_a = kTelemetryNorm, "clipped_norm"_a = kTelemetryClippedNorm,
               "limit"_a = kTelemetryLimit, "flags"_a = kTelemetryFlags, "nonfinite"_a = kTelemetryNonfinite);
  module.attr("TELEMETRY_FLAGS") = py::dict("clipped"_a = kRecordedClipped, "skipped"_a = kRecordedSkipped,
                                            "refused"_a = kRecordedRefused, "spiked"_a = kRecordedSpiked);
  module.attr("SCOPE_COLUMNS") = py::make_tuple("small", "medium", "large", "nonfinite", "nan");
  static_assert(kScopeColumns == 5, "SCOPE_COLUMNS names them all");
}

}  // namespace steadygrad::bindings
