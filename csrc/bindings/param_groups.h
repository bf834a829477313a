// Param groups, which optimizers keep as dicts; they are read and checked in every step.
#pragma once

#include <string>
#include <vector>

#include <pybind11/pybind11.h>

#include "bindings/tensor.h"
#include "core/rules/table.h"
#include "core/step.h"

namespace steadygrad::bindings {

// Keys of every param group. The first two hold None for no limit.
inline constexpr const char* kLimits[] = {"max_norm", "clip_value", "l1", "l2"};
inline constexpr const char* kClipping = "clipping";
// The counters of steps; the last one exists only with stochastic rounding.
inline constexpr const char* kSkippedSteps = "skipped_steps";
inline constexpr const char* kClippedSteps = "clipped_steps";
inline constexpr const char* kRoundedSteps = "rounded_steps";

const RuleEntry& rule_named(const std::string& name);

// Reads the numbers of param groups for one rule. The checks of steadygrad.arguments refuse wrong numbers,
// with their own messages.
class GroupReader {
 public:
  // `defaults` holds the limits of groups that lack them. `clips_units` says whether groups have a limit for
  // units.
  GroupReader(const RuleEntry& rule, py::dict defaults, bool clips_units);

  // Reads group `index`. A learning rate in a tensor on `device` is not waited for: `lr` gets its address.
  GroupOptions read(PyObject* group, Py_ssize_t index, Device& device) const;

  // Returns the options that decide which state exists and whether kernels can step the group, as bits: the
  // states that are kept, and the flags "differentiable" and "capturable".
  uint32_t structure_of(PyObject* group, const RuleHyper& hyper) const;

 private:
  // A field with its key as a Python string, which is made once.
  template <class Field>
  struct Keyed {
    py::object key;
    Field field;
  };

  PyObject* limit_of(PyObject* group, const py::object& key) const;

  const RuleEntry* rule_;
  py::dict defaults_;
  bool clips_units_;
  std::vector<Keyed<NumberField>> numbers_;
  std::vector<Keyed<FlagField>> flags_;
  std::vector<py::object> counters_;
  std::vector<py::object> limits_;
  py::object clipping_;
  std::vector<py::object> structure_;
};

// Adds to a counter of all groups, starting from the largest value in any of them.
void count_steps(const py::list& param_groups, const char* counter, int64_t steps);

// Returns the number of steps with stochastic rounding that the groups hold.
uint64_t rounded_steps_of(const py::list& param_groups);

void define_param_groups(py::module_& module);

}  // namespace steadygrad::bindings
