// What a plan is told in numbers and names, as the kernels take it.
#pragma once

#include <string>
#include <vector>

#include <pybind11/pybind11.h>

#include "bindings/tensor.h"
#include "core/policy.h"
#include "core/rules/table.h"
#include "core/step.h"
#include "core/telemetry.h"

namespace steadygrad::bindings {

// The numbers of a param group, in the order in which a step takes them.
inline constexpr const char* kGroupFields[] = {"lr",
                                               "weight_decay",
                                               "momentum",
                                               "dampening",
                                               "beta1",
                                               "beta2",
                                               "eps",
                                               "alpha",
                                               "lr_decay",
                                               "rho",
                                               "lambd",
                                               "t0",
                                               "momentum_decay",
                                               "etaminus",
                                               "etaplus",
                                               "step_size_min",
                                               "step_size_max",
                                               "nesterov",
                                               "maximize",
                                               "amsgrad",
                                               "centered",
                                               "decoupled_weight_decay",
                                               "max_norm",
                                               "clip_value",
                                               "l1",
                                               "l2",
                                               "clipping"};

// One per param group; refuses any number of them but `expected`.
std::vector<GroupOptions> group_options_of(const py::list& groups, size_t expected);

const RuleEntry* rule_named(const std::string& name);

StepOptions step_options(const RuleEntry& rule, const py::dict& options);

// Their numbers: options["clip_policy"], None or (name, max_norm, level, decay, factor, warmup, window), and
// options["skip_policy"], None or (sigma, window).
Policies policies_of(const py::dict& options);

// Their state: None, or (rows of the clip policy or None, row of the skip policy or None), float64.
Policies with_rows(Policies policies, const py::object& rows, int64_t scopes, Device& device);

// Where to record a step: None, or (rows in float64, steps so far in int64, how many rows, whether they have
// columns for each of the parameters).
Telemetry telemetry_of(const py::object& telemetry, size_t parameters, Device& device);

}  // namespace steadygrad::bindings
