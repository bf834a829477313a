#include "bindings/param_groups.h"

#include <cmath>

#include <pybind11/stl.h>

namespace steadygrad::bindings {
namespace {

py::object interned(const char* text) {
  return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(text));
}

py::object check_of(const char* name) { return py::module_::import("steadygrad.arguments").attr(name); }

// Returns the entry of a group, or null if there is none.
PyObject* entry_of(PyObject* group, const py::object& key) {
  PyObject* const value = PyDict_GetItemWithError(group, key.ptr());
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

PyObject* required_entry(PyObject* group, const py::object& key) {
  PyObject* const value = entry_of(group, key);
  if (value != nullptr) return value;
  PyErr_SetObject(PyExc_KeyError, key.ptr());
  throw py::error_already_set();
}

struct Range {
  double low = 0;
  double below = INFINITY;
  bool finite = true;
};

// Checks Python's own numbers here, and leaves all others to Python, which also raises the errors.
double number_of(PyObject* value, const Range& range, Py_ssize_t group, const py::object& key,
                 int part = -1) {
  if (PyFloat_CheckExact(value) || PyLong_CheckExact(value)) {
    const double number = PyFloat_CheckExact(value) ? PyFloat_AS_DOUBLE(value) : PyLong_AsDouble(value);
    PyErr_Clear();  // an int that is too large for a float gave -1
    const bool is_less = number < range.below || range.below == INFINITY;
    const bool fits = number >= range.low && is_less && (!range.finite || std::isfinite(number));
    if (fits && (number != -1 || PyFloat_CheckExact(value))) return number;
  }
  std::string where = "step: param_groups[" + std::to_string(group) + "]: " + std::string(py::str(key));
  if (part >= 0) where += "[" + std::to_string(part) + "]";
  return check_of("checked_number")(where, py::handle(value), py::arg("low") = range.low,
                                    py::arg("below") = range.below, py::arg("finite") = range.finite)
      .cast<double>();
}

bool flag_of(PyObject* value) {
  if (value == Py_True) return true;
  if (value == Py_False) return false;
  const double number = PyFloat_AsDouble(value);
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  return number != 0;
}

// Returns one of the numbers of a key that holds two.
py::object part_of(PyObject* values, const NumberField& field) {
  const auto parts = py::reinterpret_steal<py::object>(PySequence_Fast(values, "expected a sequence"));
  if (!parts) throw py::error_already_set();
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(parts.ptr());
  if (size != 2) {
    throw py::value_error(std::string(field.key) + ": expected 2 numbers, got " + std::to_string(size));
  }
  return py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(parts.ptr(), field.index));
}

uint32_t kept_states(const RuleEntry& rule, const RuleHyper& hyper) {
  uint32_t kept = 0;
  uint32_t bit = 1;
  for (const StateField& state : rule.states) {
    if (state.is_kept == nullptr || state.is_kept(hyper)) kept |= bit;
    bit <<= 1;
  }
  return kept;
}

// Returns the names of the states that a group's options need. A number that a step would refuse counts as
// non-zero.
std::vector<std::string> state_names(const std::string& name, const py::dict& group) {
  const RuleEntry& rule = rule_named(name);
  RuleHyper hyper;
  for (const NumberField& field : rule.numbers) {
    if (field.to != &RuleHyper::momentum) continue;
    hyper.*field.to = PyFloat_AsDouble(required_entry(group.ptr(), interned(field.key)));
    PyErr_Clear();
  }
  for (const FlagField& field : rule.flags) {
    hyper.*field.to = PyObject_IsTrue(required_entry(group.ptr(), interned(field.key))) == 1;
    PyErr_Clear();
  }
  std::vector<std::string> names;
  for (const StateField& state : rule.states) {
    if (state.is_kept == nullptr || state.is_kept(hyper)) names.emplace_back(state.name);
  }
  return names;
}

int64_t checked_count(const std::string& where, PyObject* value) {
  return check_of("checked_count")(where, py::handle(value)).cast<int64_t>();
}

}  // namespace

const RuleEntry& rule_named(const std::string& name) {
  for (const RuleEntry& entry : kRules) {
    if (entry.name == name) return entry;
  }
  throw py::value_error("Plan: rule: expected the name of an update rule, got " + name);
}

GroupReader::GroupReader(const RuleEntry& rule, py::dict defaults, bool clips_units)
    : rule_(&rule), defaults_(std::move(defaults)), clips_units_(clips_units) {
  for (const NumberField& field : rule.numbers) numbers_.push_back({interned(field.key), field});
  for (const FlagField& field : rule.flags) flags_.push_back({interned(field.key), field});
  for (const char* counter : {kSkippedSteps, kClippedSteps}) counters_.push_back(interned(counter));
  for (const char* limit : kLimits) limits_.push_back(interned(limit));
  clipping_ = interned(kClipping);
  if (rule.kind == RuleKind::none) return;
  for (const char* flag : {"differentiable", "capturable"}) structure_.push_back(interned(flag));
}

PyObject* GroupReader::limit_of(PyObject* group, const py::object& key) const {
  PyObject* const value = entry_of(group, key);
  return value != nullptr ? value : required_entry(defaults_.ptr(), key);
}

GroupOptions GroupReader::read(PyObject* group, Py_ssize_t index, Device& device) const {
  if (!PyDict_Check(group)) throw py::type_error("step: param_groups: expected dicts");
  GroupOptions options;
  for (const auto& [key, field] : numbers_) {
    PyObject* const value = required_entry(group, key);
    const Range range{field.low, field.below};
    if (field.to == &RuleHyper::lr && device.backend->is_asynchronous && is_number_on(device, value)) {
      options.lr = number_on(value, {"step", "lr", index}, device);  // read by the kernels
      continue;
    }
    options.hyper.*field.to = field.index < 0
                                  ? number_of(value, range, index, key)
                                  : number_of(part_of(value, field).ptr(), range, index, key, field.index);
  }
  for (const auto& [key, field] : flags_) options.hyper.*field.to = flag_of(required_entry(group, key));
  for (const py::object& counter : counters_) {
    // A value that was set by hand, or loaded by the wrapped optimizer, is checked now: counting would fail
    // only after the update.
    PyObject* const value = entry_of(group, counter);
    if (value == nullptr || PyLong_CheckExact(value)) continue;
    checked_count("step: param_groups[" + std::to_string(index) + "]: " + std::string(py::str(counter)),
                  value);
  }
  double* const limits[] = {&options.max_norm, &options.clip_value, &options.l1, &options.l2};
  for (size_t i = 0; i < limits_.size(); ++i) {
    const bool is_limit = i < 2;
    if (i == 2 && clips_units_) {
      PyObject* const clipping = limit_of(group, clipping_);
      if (clipping != Py_None) options.clipping = number_of(clipping, {0, INFINITY, false}, index, clipping_);
    }
    PyObject* const value = limit_of(group, limits_[i]);
    if (value == Py_None && is_limit) continue;  // the limit stays infinite
    *limits[i] = number_of(value, {0, INFINITY, !is_limit}, index, limits_[i]);
  }
  return options;
}

uint32_t GroupReader::structure_of(PyObject* group, const RuleHyper& hyper) const {
  uint32_t structure = kept_states(*rule_, hyper);
  uint32_t bit = 1U << 31;
  for (const py::object& key : structure_) {
    PyObject* const value = entry_of(group, key);
    if (value != nullptr && value != Py_None && value != Py_False && PyObject_IsTrue(value) == 1) {
      structure |= bit;
    }
    bit >>= 1;
  }
  PyErr_Clear();
  return structure;
}

void count_steps(const py::list& param_groups, const char* counter, int64_t steps) {
  const py::object key = interned(counter);
  int64_t most = 0;
  for (const py::handle group : param_groups) {
    PyObject* const value = entry_of(group.ptr(), key);
    if (value != nullptr) most = std::max(most, py::cast<int64_t>(py::handle(value)));
  }
  const py::int_ total(most + steps);
  for (const py::handle group : param_groups) {
    if (PyDict_SetItem(group.ptr(), key.ptr(), total.ptr()) != 0) throw py::error_already_set();
  }
}

uint64_t rounded_steps_of(const py::list& param_groups) {
  if (param_groups.empty()) return 0;
  PyObject* const value = entry_of(py::object(param_groups[0]).ptr(), interned(kRoundedSteps));
  if (value == nullptr) return 0;
  const std::string where = "step: param_groups[0]['" + std::string(kRoundedSteps) + "']";
  return static_cast<uint64_t>(checked_count(where, value));
}

void define_param_groups(py::module_& module) {
  module.def(
      "check_param_groups",
      [](const std::string& rule, const py::list& param_groups, const py::dict& defaults, bool clips_units,
         const py::object& device) {
        const GroupReader reader(rule_named(rule), defaults, clips_units);
        Device where = device_named(device);
        Py_ssize_t index = 0;
        for (const py::handle group : param_groups) reader.read(group.ptr(), index++, where);
      },
      py::arg("rule"), py::arg("param_groups"), py::arg("defaults"), py::arg("clips_units"),
      py::arg("device"));
  module.def(
      "count_steps",
      [](const py::list& param_groups, const std::string& counter, int64_t steps) {
        count_steps(param_groups, counter.c_str(), steps);
      },
      py::arg("param_groups"), py::arg("counter"), py::arg("steps"));
  module.def("state_names", &state_names, py::arg("rule"), py::arg("group"));
  // Returns the names of the numbers in a state of the rule, the step counter first.
  module.def(
      "state_numbers",
      [](const std::string& name) {
        const RuleEntry& rule = rule_named(name);
        std::vector<std::string> names(rule.state_numbers.begin(), rule.state_numbers.end());
        if (rule.has_step) names.insert(names.begin(), "step");
        return names;
      },
      py::arg("rule"));
  py::list limits;
  for (const char* limit : kLimits) limits.append(limit);
  module.attr("LIMITS") = py::tuple(limits);
  module.attr("CLIPPING") = kClipping;
  module.attr("COUNTERS") = py::make_tuple(kSkippedSteps, kClippedSteps);
  module.attr("ROUNDED_STEPS") = kRoundedSteps;
}

}  // namespace steadygrad::bindings
