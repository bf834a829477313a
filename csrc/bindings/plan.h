// A plan holds the parameters and state tensors that an optimizer steps, and keeps them alive from step to
// step. It stores no pointers into them: every step looks at each tensor again, so that it notices memory
// that was moved, shared, resized or freed.
#pragma once

#include <optional>
#include <vector>

#include <pybind11/pybind11.h>

#include "bindings/param_groups.h"
#include "bindings/plan_options.h"
#include "bindings/tensor.h"
#include "core/rules/table.h"

namespace steadygrad::bindings {

class Plan {
 public:
  // `rule` names the rule whose options the param groups hold. `fused` says whether the plan does the update,
  // too, or only what comes before it. `slots` has a slot per parameter, in order, or None if there is no
  // state yet. `options` are those of step_options() and policies_of(). `defaults` holds the limits of groups
  // that lack them. `device` is where steps are decided, None for the host.
  Plan(const std::string& rule, bool fused, const py::list& param_groups, const py::list& slots,
       const py::dict& options, const py::dict& defaults, const py::object& device);

  // Remembers which objects `state` holds, so that a change of any of them is noticed.
  void seal(const py::dict& state);

  // Returns whether param_groups and state still hold the very objects that this plan was made from, and the
  // options that decide which state exists.
  bool matches(const py::list& param_groups, const py::dict& state) const;

  // Takes one step, whose outcome is in `memory`, or without it in outcome(). Returns false, having done
  // nothing, if a new plan is needed: parameters, state or options were exchanged, or a parameter has a
  // gradient and no slot yet. `grads` replaces the parameters' .grad, with None for a parameter without
  // gradient. If `reduction` throws, everything stays as it was. `skips_nonfinite` overrides the option
  // `nonfinite`. With `creates_state`, zero gradients create state and leave no other trace.
  bool step(const py::list& param_groups, const py::dict& state, const Scaling* scaling,
            const std::optional<py::list>& grads, const ReductionMemory* reduction,
            const py::object& clip_rows, const py::object& skip_row, const TelemetryMemory* telemetry,
            bool skips_nonfinite, bool creates_state, const DeviceMemory* memory);

  // Returns whether a captured graph uses this plan's device memory.
  bool captured() const { return table_.captured; }

  // Returns the outcome of the last step on the host.
  const Outcome& outcome() const { return outcome_; }
  // Returns the number of non-finite elements of each parameter in that step, if they are errors.
  const std::vector<int64_t>& nonfinite() const { return nonfinite_; }

  // Returns the parameters that took part in the last step.
  py::list active() const;
  // Returns the places of these parameters in the order of the groups.
  const std::vector<int64_t>& active_indices() const { return active_; }

  // Visits objects for Python's garbage collector: hooks and attributes of parameters may refer to their
  // optimizer.
  int visit(visitproc visit, void* arg) const;
  void clear();

 private:
  class Stepping;
  struct Kept {
    std::vector<py::object> objects;  // the states, then the extra and the numbers, if there are any
    bool has_extra = false;
  };

  bool updates() const { return options_.rule != RuleKind::none; }
  bool holds_the_same(const py::list& param_groups, const py::dict& state) const;
  // Returns false if options have changed which state exists.
  bool read_groups(const py::list& param_groups);
  Found* found_of(size_t index) { return &found_[index * tensors_per_param_]; }
  // Looks at every tensor that takes part; returns false if a slot is missing.
  bool gather(const std::optional<py::list>& grads);
  void prefetch(size_t index) const;
  // Returns false if the slot does not fit.
  bool add_tensor(size_t index, PyObject* grad, int32_t group_index);
  PyObject* local(const py::object& tensor);
  // Returns whether gradients are only read. Then those that torch negates lazily are copied; otherwise they
  // are refused if their sign matters.
  bool reads_resolved_grads() const { return updates() && !options_.write_grads; }
  // Returns the number of scopes of the clip.
  int64_t scopes() const;
  Reduction reduction_for(const ReductionMemory* reduction);
  // Return the memory of a step, still without policies and telemetry.
  StepMemory host_memory();
  StepMemory device_memory(const DeviceMemory& given, const Scaling* scaling);
  void* scratch_of(const py::object& allocate, int64_t bytes, Stream stream);
  // Before the plan's memory is used on a stream.
  void record_stream(Stream stream);
  void count_on_host(const py::list& param_groups, bool only_creates_state);
  // Bumps the versions of what the step writes.
  void announce_step(bool writes_grads) const;
  Argument argument(size_t index, const char* attribute) const;

  const RuleEntry* rule_;
  GroupReader reader_;
  StepOptions options_;
  NonfinitePolicy nonfinite_policy_;
  Policies policies_;  // without the rows of their state
  bool per_tensor_;    // whether reductions have a row per parameter
  Device where_;
  std::vector<std::vector<py::object>> groups_;
  std::vector<py::object> params_;
  std::vector<Kept> slots_;
  std::vector<uint32_t> structure_;  // per param group
  std::vector<const void*> sealed_;

  // The parameter, its gradient, the states and the numbers of each parameter, as the last step found them.
  // Thousands of small tensors are a chain of cache misses, which early prefetches of the next parameters
  // break.
  std::vector<Found> found_;
  size_t tensors_per_param_ = 2;

  bool stepping_ = false;

  // Every step fills these anew; they are members only to reuse their memory.
  std::vector<GroupOptions> group_options_;
  std::vector<int64_t> active_;
  std::vector<py::object> grads_;
  std::vector<py::object> locals_;  // the local tensors of DTensors
  std::vector<TensorOperands> tensors_;
  std::vector<StepCounter> counters_;
  Device device_;

  // The memory of steps that the host decides.
  Outcome outcome_;
  std::vector<int32_t> taken_;
  std::vector<int64_t> nonfinite_;

  // What an asynchronous backend keeps from step to step, and the memory that it was given for it.
  StepTable table_;
  std::vector<py::object> device_memory_;
  void* memory_stream_ = nullptr;  // the stream that it was made on, or that was recorded last
};

void define_plan(py::module_& module);

}  // namespace steadygrad::bindings
