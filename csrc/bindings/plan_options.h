// What a plan is told: numbers and names as the kernels take them, and structs that Python fills by name.
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

// The state that a plan steps with one parameter.
struct Slot {
  std::vector<py::object> states;   // in the rule's order
  std::vector<py::object> numbers;  // the step counter and the rule's other numbers, if it has any
  py::object extra;                 // what is kept beside a half-precision parameter, or None
  bool first = false;               // whether its first step is still to come
};

// torch.amp.GradScaler's numbers, as numbers or as tensors on a device that is not waited for.
struct Scaling {
  double unscale = 1;
  bool found_inf = false;
  py::object grad_scale_tensor;
  py::object found_inf_tensor;
};

// Tensors on a device where steps are decided; each may be None but `outcome` and `taken`. See StepMemory.
struct DeviceMemory {
  py::object outcome;
  py::object taken;
  py::object counts;
  py::object nonfinite;
  py::object rounded_steps;
  py::object allocate;  // makes scratch space
};

// The ring that steps are recorded in (core/telemetry.h).
struct TelemetryMemory {
  py::object rows;
  py::object recorded;
  int64_t history = 0;
  bool per_tensor = false;
};

// What stays the same from step to step, by the names of StabilizerOptions.
StepOptions step_options(RuleKind rule, const py::dict& options);

// options["clip_policy"] and options["skip_policy"], each of which may be None.
Policies policies_of(const py::dict& options);

// With their state, float64: rows of the clip policy and row of the skip policy, or None.
Policies with_rows(Policies policies, const py::object& clip_rows, const py::object& skip_row, int64_t scopes,
                   Device& device);

Telemetry telemetry_of(const TelemetryMemory* memory, size_t parameters, Device& device);

void define_plan_options(py::module_& module);

}  // namespace steadygrad::bindings
