// The options of a plan as the kernels take them, and structs that Python fills by name.
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

// The state that a plan steps together with one parameter.
struct Slot {
  std::vector<py::object> states;   // in the rule's order
  std::vector<py::object> numbers;  // the step counter and the rule's other numbers, if it has any
  py::object extra;                 // what is kept beside a half-precision parameter, or None
  bool first = false;               // whether the parameter's first step is still to come
};

// The numbers of torch.amp.GradScaler, as numbers or as tensors on a device, which is not waited for.
struct Scaling {
  double unscale = 1;
  bool found_inf = false;
  py::object grad_scale_tensor;
  py::object found_inf_tensor;
};

// Tensors on the device that decides about steps; all but `outcome` and `taken` may be None. See StepMemory.
struct DeviceMemory {
  py::object outcome;
  py::object taken;
  py::object counts;
  py::object nonfinite;
  py::object rounded_steps;
  py::object allocate;  // allocates scratch space
};

// The ring in which steps are recorded (core/telemetry.h).
struct TelemetryMemory {
  py::object rows;
  py::object recorded;
  int64_t history = 0;
  bool per_tensor = false;
};

// Returns the options that stay the same from step to step, which are named as in StabilizerOptions.
StepOptions step_options(RuleKind rule, const py::dict& options);

// Returns options["clip_policy"] and options["skip_policy"], each of which may be None.
Policies policies_of(const py::dict& options);

// Adds the policies' state in float64: rows of the clip policy and the row of the skip policy, or None.
Policies with_rows(Policies policies, const py::object& clip_rows, const py::object& skip_row, int64_t scopes,
                   Device& device);

Telemetry telemetry_of(const TelemetryMemory* memory, size_t parameters, Device& device);

void define_plan_options(py::module_& module);

}  // namespace steadygrad::bindings
