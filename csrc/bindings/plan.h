// A plan: the parameters and state tensors that an optimizer steps, kept alive from step to step. It stores
// no pointers into them: every step looks at each tensor again, so that moved, shared, resized or freed
// memory is seen.
#pragma once

#include <optional>
#include <vector>

#include <pybind11/pybind11.h>

#include "bindings/tensor.h"
#include "core/rules/table.h"
#include "cpu/operations.h"

namespace steadygrad::bindings {

class Plan {
 public:
  // `groups`: per param group the list of its parameters. `slots`: per parameter, in order, None (no state
  // yet) or (step tensor or None, [state tensors in the rule's order], first step?, what is kept beside a
  // half-precision parameter or None).
  Plan(const std::string& rule, const py::list& groups, const py::list& slots, const py::dict& options);

  // Remembers which objects `state` holds, so that a change of any of them is noticed.
  void seal(const py::dict& state);

  // Whether param_groups and state still hold the very objects this plan was made from.
  bool matches(const py::list& param_groups, const py::dict& state) const;

  // One step on the CPU, or nothing when a parameter has a gradient and no slot yet. `groups`: per param
  // group the numbers of kGroupFields. `grads`: what to use in place of the parameters' .grad (None: no part
  // in this step). `rounded_steps`: steps taken before this one, for stochastic rounding. `reduction`: see
  // reduction_of(); what it throws leaves everything as it was. `policy_rows`: see with_rows(). `telemetry`:
  // see telemetry_of().
  std::optional<cpu::StepReport> step(const py::list& groups, double unscale, bool found_inf,
                                      const std::optional<py::list>& grads, uint64_t rounded_steps,
                                      const py::object& reduction, const py::object& policy_rows,
                                      const py::object& telemetry);

  // One step on the CUDA backend; false when a parameter has a gradient and no slot yet. `memory`: the
  // tensors it reads and fills. `learning_rates`: per param group None or a tensor on the device that
  // replaces lr.
  bool step_on_device(const py::list& groups, double unscale, bool found_inf,
                      const std::optional<py::list>& grads, const py::dict& memory,
                      const py::list& learning_rates, const py::object& allocate, const py::object& reduction,
                      const py::object& policy_rows, const py::object& telemetry);
  // Whether a captured graph uses this plan's device memory.
  bool captured() const { return device_plan_.captured(); }

  // The parameters that took part in the last step.
  py::list active() const;
  // Their positions in the order of the groups.
  const std::vector<int64_t>& active_indices() const { return active_; }

  // For Python's garbage collector: hooks and attributes of parameters may refer back to their optimizer.
  int visit(visitproc visit, void* arg) const;
  void clear();

  // After a first step, SGD's momentum buffers hold values.
  void mark_first_steps_done();

 private:
  class Stepping;
  struct Slot {
    std::vector<py::object> objects;  // the states, then the extra and the step counter if there are any
    bool has_extra = false;
    bool first = false;
  };

  // Looks at every tensor that takes part; false when a slot is missing.
  bool gather(const std::vector<GroupOptions>& groups, const std::optional<py::list>& grads);
  void prefetch(size_t index) const;
  void remember(size_t index, const View* views, int count, PyObject* grad);
  // False when the slot does not fit.
  bool add_tensor(size_t index, PyObject* grad, const GroupOptions& group, int32_t group_index);
  PyObject* local(const py::object& tensor);
  // Whether gradients are read alone: those that torch negates lazily are then copied, and else refused where
  // their sign matters.
  bool reads_resolved_grads() const { return options_.rule != RuleKind::none && !options_.write_grads; }
  // How many scopes the clip has.
  int64_t scopes() const;
  Reduction reduction_for(const py::object& reduction);
  // What of a device's memory Python has made for the step.
  cuda::StepMemory step_memory(const py::dict& memory);
  void announce_update() const;
  Argument argument(size_t index, const char* attribute) const;

  const RuleEntry* rule_;
  StepOptions options_;
  Policies policies_;  // without their rows
  bool per_tensor_;    // whether reductions have a row for each parameter
  std::vector<std::vector<py::object>> groups_;
  std::vector<py::object> params_;
  std::vector<Slot> slots_;
  std::vector<const void*> sealed_;

  // Where the last step found each parameter's tensors. Never dereferenced: thousands of small tensors are a
  // chain of cache misses, and asking for the next parameters' lines early breaks it.
  std::vector<std::vector<const char*>> hints_;

  bool stepping_ = false;

  // Filled anew by every step; members only to reuse their memory.
  std::vector<int64_t> active_;
  std::vector<py::object> grads_;
  std::vector<py::object> locals_;  // what DTensors hold
  std::vector<TensorOperands> tensors_;
  std::vector<cpu::StepCounter> counters_;
  Device device_;

  // The CUDA backend's part, and the device memory it was given.
  cuda::StepPlan device_plan_;
  std::vector<py::object> device_memory_;
};

void define_plan(py::module_& module);

}  // namespace steadygrad::bindings
