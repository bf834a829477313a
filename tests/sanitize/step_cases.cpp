// Whole steps: every rule on every kind of tensors, every policy in every scope, and each option alone.
#include "sanitize/report.h"
#include "sanitize/step.h"

namespace steadygrad::sanitize {
namespace {

constexpr std::pair<const char*, NonfinitePolicy> kPolicies[] = {{"skip", NonfinitePolicy::skip},
                                                                 {"zero", NonfinitePolicy::zero},
                                                                 {"raise", NonfinitePolicy::raise},
                                                                 {"propagate", NonfinitePolicy::propagate}};
constexpr std::pair<const char*, ClipScope> kScopes[] = {
    {"global", ClipScope::global}, {"group", ClipScope::group}, {"tensor", ClipScope::tensor}};

StepCase case_of(const Specs& specs, const std::string& rule) {
  StepCase step_case;
  step_case.specs = specs;
  step_case.rule = rule_variant(rule);
  step_case.group.max_norm = 1;
  return step_case;
}

void check(Report& report, const std::string& name, const StepCase& step_case) {
  report.check("step " + name + ", " + step_case.rule.name, step_case.specs,
               [&] { return compare_steps(step_case); });
}

void check_rules(Report& report) {
  size_t turn = 0;
  for (const RuleVariant& rule : rule_variants()) {
    for (const Specs& specs : all_tensors()) {
      StepCase plain = case_of(specs, rule.name);
      plain.tensors_come_and_go = true;
      plain.gradients = {Values::ordinary, Values::ordinary, Values::nonfinite};
      check(report, "clipped", plain);
      StepCase full = case_of(specs, rule.name);
      full.group.clip_value = 0.05;
      full.group.l1 = 0.01;
      full.group.l2 = 0.02;
      full.options.penalty_before_clip = turn % 2 == 0;
      full.options.proximal = turn % 3 == 0;
      full.options.write_grads = turn % 5 < 2;
      full.options.clip_scope = kScopes[turn % 3].second;
      full.options.nonfinite = NonfinitePolicy::zero;
      full.options.unscale = 0.25;
      full.numbers_on_device = turn % 2 == 1;
      full.gradients = {Values::nonfinite, Values::ordinary};
      check(report, "with everything", full);
      ++turn;
    }
  }
}

void check_decisions(Report& report) {
  for (const auto& [policy_name, policy] : kPolicies) {
    for (const auto& [scope_name, scope] : kScopes) {
      for (const bool write_grads : {false, true}) {
        for (const Specs& specs : {half_tensors(), many_tensors()}) {
          StepCase step_case = case_of(specs, write_grads ? "sgd with momentum" : "adamw");
          step_case.options.nonfinite = policy;
          step_case.options.clip_scope = scope;
          step_case.options.write_grads = write_grads;
          step_case.gradients = {Values::nonfinite, Values::ordinary};
          const std::string name = std::string(policy_name) + " by " + scope_name;
          check(report, name + (write_grads ? ", written" : ""), step_case);
          if (write_grads) continue;
          step_case.two_processes = true;
          step_case.tensors_come_and_go = true;
          check(report, name + ", two processes", step_case);
        }
      }
    }
  }
}

void check_options(Report& report) {
  for (const Specs& specs : {direct_tensors(), half_tensors(), double_tensors(), mixed_tensors()}) {
    const auto check_with = [&](const char* name, const char* rule, auto change) {
      StepCase step_case = case_of(specs, rule);
      change(step_case);
      check(report, name, step_case);
    };
    check_with("without limit", "adam", [](StepCase& c) { c.group.max_norm = INFINITY; });
    check_with("not clipped", "adam", [](StepCase& c) { c.group.max_norm = 1e30; });
    check_with("not clipped, written", "adam", [](StepCase& c) {
      c.group.max_norm = 1e30;
      c.options.write_grads = true;
    });
    check_with("clip value", "sgd", [](StepCase& c) { c.group.clip_value = 0.05; });
    check_with("proximal", "adam", [](StepCase& c) {
      c.options.proximal = true;
      c.group.l1 = 1;
    });
    check_with("penalties before the clip", "sgd", [](StepCase& c) { c.group.l1 = c.group.l2 = 0.01; });
    check_with("penalties after the clip", "sgd", [](StepCase& c) {
      c.group.l1 = c.group.l2 = 0.01;
      c.options.penalty_before_clip = false;
    });
    check_with("unscaled", "adagrad", [](StepCase& c) { c.options.unscale = 0x1p-10; });
    check_with("unscaled on the device", "adagrad", [](StepCase& c) {
      c.options.unscale = 1.0 / 3.0F;
      c.numbers_on_device = true;
    });
    check_with("inf was found", "adam", [](StepCase& c) { c.options.found_inf = true; });
    check_with("inf was found, two processes", "adam", [](StepCase& c) {
      c.options.found_inf = true;
      c.two_processes = true;
    });
    check_with("inf was found on the device", "adam", [](StepCase& c) {
      c.options.found_inf = true;
      c.numbers_on_device = true;
    });
    check_with("extreme", "rmsprop", [](StepCase& c) { c.gradients = {Values::extreme, Values::extreme}; });
    for (const double p : {1.0, double{INFINITY}, -double{INFINITY}, 0.0, 3.0}) {
      const std::string name = "norm " + std::to_string(p);
      check_with(name.c_str(), "sgd", [&](StepCase& c) {
        c.options.norm_type = norm_type(p);
        c.options.clip_scope = ClipScope::group;
        c.gradients = {Values::ordinary, Values::nonfinite};
      });
      check_with((name + ", two processes").c_str(), "sgd", [&](StepCase& c) {
        c.options.norm_type = norm_type(p);
        c.options.clip_scope = ClipScope::tensor;
        c.gradients = {Values::ordinary, Values::nonfinite};
        c.two_processes = true;
      });
    }
    StepCase expanded = case_of(with_expanded_gradients(specs), "adam");
    check(report, "clipped", expanded);
  }
}

void check_roundings(Report& report) {
  constexpr std::pair<const char*, Rounding> kRoundings[] = {
      {"stochastic", Rounding::stochastic}, {"kahan", Rounding::kahan}, {"master", Rounding::master}};
  for (const auto& [name, rounding] : kRoundings) {
    for (const Specs& specs : {half_tensors(), double_tensors(), mixed_tensors()}) {
      for (const char* rule : {"sgd", "adamw amsgrad", "rmsprop centered with momentum and decay"}) {
        StepCase step_case = case_of(specs, rule);
        step_case.options.rounding = rounding;
        step_case.options.rounding_seed = 5;
        step_case.tensors_come_and_go = true;
        step_case.group.l1 = 0.01;
        step_case.gradients = {Values::ordinary, Values::nonfinite, Values::ordinary};
        check(report, name, step_case);
        step_case.options.proximal = true;
        step_case.options.nonfinite = NonfinitePolicy::propagate;
        check(report, std::string(name) + ", proximal", step_case);
      }
    }
  }
}

void check_policies(Report& report) {
  // max_norm, level, decay, factor, warm-up, window
  const std::pair<const char*, ClipPolicy> policies[] = {
      {"percentile", {PolicyKind::percentile, INFINITY, 0.4, 0, 1, 0, 1100}},
      {"z-score", {PolicyKind::zscore, 50, 1.5, 0.8, 0.9, 2, 0}},
      {"relative", {PolicyKind::relative, 2, 1.05, 0.9, 1, 2, 0}},
      {"damp", {PolicyKind::damp, 0.5, 0.5, 0, 1, 0, 0}},
      {"adaptive", {PolicyKind::adaptive, INFINITY, 1e-3, 0, 1, 0, 0}}};
  for (const auto& [policy_name, policy] : policies) {
    for (const auto& [scope_name, scope] : kScopes) {
      for (const bool two_processes : {false, true}) {
        StepCase step_case = case_of(mixed_tensors(), "sgd with momentum");
        step_case.policies.clip = policy;
        step_case.policies.skip = {0.5, 3};
        step_case.group.max_norm = 40;
        step_case.group.clipping = 0.3;  // of the adaptive one
        step_case.options.clip_scope = scope;
        step_case.tensors_come_and_go = true;
        step_case.two_processes = two_processes;
        step_case.gradients.assign(7, Values::ordinary);
        step_case.gradients[3] = Values::nonfinite;
        check(report,
              std::string(policy_name) + " by " + scope_name + (two_processes ? ", two processes" : ""),
              step_case);
      }
    }
  }
}

// More tensors than one launch brings to the device.
void check_split(Report& report) {
  Specs specs{"3600", std::vector<TensorSpec>(3600)};
  for (size_t t = 0; t < specs.tensors.size(); ++t) {
    specs.tensors[t].numel = 1 + static_cast<int64_t>(t % 2);
    specs.tensors[t].group = static_cast<int32_t>(t / 100);
  }
  StepCase step_case = case_of(specs, "sgd with momentum");
  step_case.options.clip_scope = ClipScope::group;
  check(report, "of more than a launch holds", step_case);
}

}  // namespace

void check_steps(Report& report) {
  check_rules(report);
  check_decisions(report);
  check_options(report);
  check_roundings(report);
  check_policies(report);
  if (!kFewCases) check_split(report);
}

}  // namespace steadygrad::sanitize
