#include "bindings/plan.h"

#include <pybind11/stl.h>

#include "bindings/signature.h"

namespace steadygrad::bindings {
namespace {

constexpr const char* kFunction = "step";

// Visits the objects of an optimizer's state in order: keys, inner dicts, values. This is faster than looking
// them up.
template <class Visit>
bool walk_state(const py::dict& state, Visit visit) {
  Py_ssize_t outer = 0;
  PyObject *param, *entry, *key, *value;
  while (PyDict_Next(state.ptr(), &outer, &param, &entry)) {
    if (!visit(param) || !visit(entry)) return false;
    if (!PyDict_Check(entry)) continue;
    Py_ssize_t inner = 0;
    while (PyDict_Next(entry, &inner, &key, &value)) {
      if (!visit(value)) return false;
    }
  }
  return true;
}

}  // namespace

Plan::Plan(const std::string& rule, bool fused, const py::list& param_groups, const py::list& slots,
           const py::dict& options, const py::dict& defaults, const py::object& device)
    : rule_(&rule_named(fused ? rule : "none")),
      reader_(rule_named(rule), defaults, policies_of(options).clip.kind == PolicyKind::adaptive),
      options_(step_options(rule_->kind, options)),
      nonfinite_policy_(options_.nonfinite),
      policies_(policies_of(options)),
      per_tensor_(options["per_tensor"].cast<bool>()),
      where_(device_named(device)) {
  for (const py::handle group : param_groups) {
    std::vector<py::object>& params = groups_.emplace_back();
    for (const py::handle param : group["params"]) {
      params.push_back(py::reinterpret_borrow<py::object>(param));
      params_.push_back(params.back());
    }
  }
  taken_.assign(params_.size(), 1);
  if (slots.size() != params_.size()) throw py::value_error("Plan: slots: expected one per parameter");
  for (const py::handle item : slots) {
    Kept& kept = slots_.emplace_back();
    if (item.is_none()) continue;
    const Slot& slot = item.cast<const Slot&>();
    kept.objects = slot.states;
    kept.has_extra = !slot.extra.is_none();
    if (kept.has_extra) kept.objects.push_back(slot.extra);
    kept.objects.insert(kept.objects.end(), slot.numbers.begin(), slot.numbers.end());
    if (slot.first) taken_[slots_.size() - 1] = 0;
    tensors_per_param_ = std::max(tensors_per_param_, 2 + kept.objects.size());
  }
  found_.resize(params_.size() * tensors_per_param_);
  device_ = where_;
  Py_ssize_t index = 0;
  for (const py::handle group : param_groups) {
    const GroupOptions read = reader_.read(group.ptr(), index, device_);
    structure_.push_back(reader_.structure_of(group.ptr(), read.hyper));
    ++index;
  }
  device_.looked.clear();
}

void Plan::seal(const py::dict& state) {
  sealed_.clear();
  walk_state(state, [&](PyObject* object) {
    sealed_.push_back(object);
    return true;
  });
}

bool Plan::matches(const py::list& param_groups, const py::dict& state) const {
  if (!holds_the_same(param_groups, state)) return false;
  Device device = where_;
  for (size_t g = 0; g < groups_.size(); ++g) {
    PyObject* const group = PyList_GET_ITEM(param_groups.ptr(), g);
    const GroupOptions read = reader_.read(group, static_cast<Py_ssize_t>(g), device);
    if (reader_.structure_of(group, read.hyper) != structure_[g]) return false;
  }
  return true;
}

bool Plan::holds_the_same(const py::list& param_groups, const py::dict& state) const {
  if (static_cast<size_t>(PyList_GET_SIZE(param_groups.ptr())) != groups_.size()) return false;
  for (size_t g = 0; g < groups_.size(); ++g) {
    static PyObject* const kParams = PyUnicode_InternFromString("params");
    PyObject* const group = PyList_GET_ITEM(param_groups.ptr(), g);
    PyObject* const params = PyDict_Check(group) ? PyDict_GetItemWithError(group, kParams) : nullptr;
    if (params == nullptr || !PyList_Check(params)) return false;
    if (static_cast<size_t>(PyList_GET_SIZE(params)) != groups_[g].size()) return false;
    for (size_t i = 0; i < groups_[g].size(); ++i) {
      if (PyList_GET_ITEM(params, i) != groups_[g][i].ptr()) return false;
    }
  }
  // If a wrapped optimizer does the update itself, its state may change in any way.
  if (!updates()) return true;
  size_t position = 0;
  const bool same = walk_state(
      state, [&](PyObject* object) { return position < sealed_.size() && sealed_[position++] == object; });
  return same && position == sealed_.size();
}

Argument Plan::argument(size_t index, const char* attribute) const {
  return {kFunction, "parameters", static_cast<Py_ssize_t>(index), attribute};
}

void Plan::prefetch(size_t index) const {
  if (index >= params_.size()) return;
  for (size_t i = 0; i < tensors_per_param_; ++i) {
    const Found& found = found_[index * tensors_per_param_ + i];
    if (found.object == nullptr) continue;
    // The sizes are inside the tensor's own object, near its middle. Prefetching memory of another device
    // does nothing.
    const char* const sizes = static_cast<const char*>(found.sizes);
    for (const int offset : {-64, 0, 64, 128}) __builtin_prefetch(sizes + offset);
    const char* const data = static_cast<const char*>(found.data);
    for (const int offset : {0, 64}) __builtin_prefetch(data + offset);
    __builtin_prefetch(found.object);
  }
}

int64_t Plan::scopes() const {
  return scope_of(options_.clip_scope, static_cast<int32_t>(groups_.size()) - 1,
                  static_cast<int32_t>(params_.size()) - 1) +
         1;
}

Reduction Plan::reduction_for(const ReductionMemory* reduction) {
  if (reduction != nullptr && options_.clip_scope == ClipScope::tensor && !per_tensor_) {
    throw py::value_error("step: reduction: expected a row per tensor where each is clipped by itself");
  }
  return reduction_of(kFunction, reduction, groups_.size(), params_.size(), per_tensor_, device_);
}

PyObject* Plan::local(const py::object& tensor) {
  py::object local = local_tensor(tensor);
  if (local.is(tensor)) return tensor.ptr();
  locals_.push_back(std::move(local));
  return locals_.back().ptr();
}

bool Plan::add_tensor(size_t index, PyObject* grad, int32_t group_index) {
  const GroupOptions& group = group_options_[group_index];
  const Kept& slot = slots_[index];
  Found* const found = found_of(index);
  const size_t states = state_count(options_.rule, group.hyper);
  if (slot.objects.size() != states + (slot.has_extra ? 1 : 0) + rule_->number_count()) return false;
  const View grad_view = view_of(grad, argument(index, ".grad"), device_);
  if (!updates() || options_.write_grads) check_writable(grad_view, argument(index, ".grad"));

  TensorOperands& tensor = tensors_.emplace_back();
  const bool penalty = group.l2 != 0 || (group.l1 != 0 && !options_.proximal);
  const bool by_unit = policies_.clip.kind == PolicyKind::adaptive && group.clipping != INFINITY;
  if (!updates() && !penalty && !by_unit) {
    tensor = operands_of(grad_view, &TensorOperands::grad);
  } else {
    View views[3 + kMaxStates];
    Operand* operands[3 + kMaxStates] = {&tensor.param, &tensor.grad};
    int count = 2;
    PyObject* objects[3 + kMaxStates] = {local(params_[index]), grad};
    views[0] = view_of(objects[0], argument(index, ""), device_);
    views[1] = grad_view;
    if (updates()) {
      check_writable(views[0], argument(index, ""));
      // A parameter whose dtype has changed needs another slot.
      if (slot.has_extra != (keeps_extra(options_.rounding) && is_half(views[0].dtype))) return false;
      for (size_t s = 0; s < states + (slot.has_extra ? 1 : 0); ++s) {
        objects[count] = local(slot.objects[s]);
        views[count] = view_of(objects[count], argument(index, " state"), device_);
        check_writable(views[count], argument(index, " state"));
        operands[count++] = s < states ? &tensor.states[s] : &tensor.extra;
      }
    }
    for (int i = 0; i < count; ++i) {
      PyObject* const object = objects[i];
      const Argument where = argument(index, i == 0 ? "" : i == 1 ? ".grad" : " state");
      if (views[i].is_complex) {
        throw_type_error(
            where, by_unit ? "a real tensor, as complex ones cannot be clipped by unit" : "a real tensor",
            object);
      }
      if (i == 1) {
        // Gradients are not kept alive, so another one may have the address of the last.
        if ((updates() || penalty) && !reads_resolved_grads()) check_not_negated(object, where);
        found[1] = {object, views[1].sizes, views[1].data};
      } else if (updates() || penalty) {
        check_not_negated(object, views[i], where, found[i]);
      }
      if (!same_sizes(views[0], views[i])) {
        throw py::value_error(where.text() + ": expected the shape of the parameter, " +
                              std::string(py::str(params_[index].attr("shape"))) + ", got " +
                              std::string(py::str(py::handle(object).attr("shape"))));
      }
    }
    set_operands(tensor, views, operands, count, by_unit);
  }
  tensor.group = group_index;
  tensor.place = static_cast<int32_t>(index);
  if (grad_view.is_complex && (tensor.grad.strides != nullptr || options_.norm_type.kind != NormKind::two)) {
    throw_type_error(argument(index, ".grad"),
                     "a real tensor, or a complex one that fills its memory and a 2-norm", grad);
  }
  StepCounter& counter = counters_.emplace_back();
  auto object = slot.objects.end() - static_cast<std::ptrdiff_t>(rule_->number_count());
  Found* found_number = found + 2 + (object - slot.objects.begin());
  if (rule_->has_step) {
    counter.step = number_on((object++)->ptr(), argument(index, " state 'step'"), device_, *found_number++);
  }
  Number* number = counter.numbers;
  for (const char* name : rule_->state_numbers) {
    const std::string where = std::string(" state '") + name + "'";
    *number++ = number_on((object++)->ptr(), argument(index, where.c_str()), device_, *found_number++);
  }
  return true;
}

// Marks the plan as in use, and releases the gradients however the step ends.
class Plan::Stepping {
 public:
  explicit Stepping(Plan& plan) : plan_(plan) {
    if (plan.stepping_) {
      throw std::runtime_error(
          "step: expected one step of an optimizer at a time, got a second one from another thread");
    }
    plan.stepping_ = true;
  }
  ~Stepping() {
    plan_.grads_.clear();
    plan_.locals_.clear();
    plan_.device_.looked.clear();
    plan_.stepping_ = false;
  }
  Stepping(const Stepping&) = delete;
  Stepping& operator=(const Stepping&) = delete;

 private:
  Plan& plan_;
};

bool Plan::read_groups(const py::list& param_groups) {
  group_options_.clear();
  for (size_t g = 0; g < groups_.size(); ++g) {
    PyObject* const group = PyList_GET_ITEM(param_groups.ptr(), g);
    group_options_.push_back(reader_.read(group, static_cast<Py_ssize_t>(g), device_));
    if (reader_.structure_of(group, group_options_.back().hyper) != structure_[g]) return false;
  }
  return true;
}

bool Plan::gather(const std::optional<py::list>& grads) {
  if (grads && grads->size() != params_.size())
    throw py::value_error("step: grads: expected one per parameter");
  active_.clear();
  tensors_.clear();
  counters_.clear();
  tensors_.reserve(params_.size());
  constexpr size_t kAhead = 8;
  for (size_t i = 0; i < kAhead; ++i) prefetch(i);
  size_t index = 0;
  for (size_t g = 0; g < groups_.size(); ++g) {
    for (size_t i = 0; i < groups_[g].size(); ++i, ++index) {
      prefetch(index + kAhead);
      py::object grad = grads ? py::object((*grads)[index]) : grad_of(params_[index].ptr());
      if (grad.is_none()) continue;
      // All tensors have to be on the device of the first one, so if that is elsewhere, all of them have
      // moved.
      if (active_.empty() && is_elsewhere(where_, local(params_[index]))) return false;
      if (reads_resolved_grads()) grad = resolved(grad.ptr());
      if (!add_tensor(index, grad.ptr(), static_cast<int32_t>(g))) return false;
      active_.push_back(static_cast<int64_t>(index));
      grads_.push_back(std::move(grad));
    }
  }
  return true;
}

bool Plan::step(const py::list& param_groups, const py::dict& state, const Scaling* scaling,
                const std::optional<py::list>& grads, const ReductionMemory* reduction,
                const py::object& clip_rows, const py::object& skip_row, const TelemetryMemory* telemetry,
                bool skips_nonfinite, bool creates_state, const DeviceMemory* memory) {
  const Stepping stepping(*this);
  if (!holds_the_same(param_groups, state)) return false;
  device_ = where_;
  device_.calls_python = reduction != nullptr;
  if (!read_groups(param_groups)) return false;
  for (GroupOptions& group : group_options_) {
    if (!creates_state) break;
    group.l1 = group.l2 = 0;
    group.max_norm = INFINITY;
  }
  if (!gather(grads)) return false;
  options_.unscale = scaling != nullptr ? scaling->unscale : 1;
  options_.found_inf = scaling != nullptr && scaling->found_inf;
  options_.nonfinite = skips_nonfinite ? NonfinitePolicy::skip : nonfinite_policy_;
  StepMemory all = memory != nullptr ? device_memory(*memory, scaling) : host_memory();
  const Reduction combined = reduction_for(reduction);
  all.policies = with_rows(policies_, clip_rows, skip_row, scopes(), device_);
  all.telemetry = telemetry_of(telemetry, params_.size(), device_);
  const bool on_host = memory == nullptr;
  if (on_host && options_.rounding == Rounding::stochastic) {
    options_.rounded_steps = rounded_steps_of(param_groups);
  }
  const auto announce = [&](bool writes_grads) {
    const py::gil_scoped_acquire acquire;
    announce_step(writes_grads);
  };
  on_backend(device_, [&](const Backend& backend, Stream stream) {
    if (!on_host) record_stream(stream);
    const auto scratch = [&](int64_t bytes) { return scratch_of(memory->allocate, bytes, stream); };
    backend.step(tensors_, counters_, group_options_, options_, all, combined, announce, table_, scratch,
                 stream);
  });
  // A step that creates state has zero gradients, but this rank cannot know that of other ranks' gradients.
  if (on_host) count_on_host(param_groups, creates_state && (reduction == nullptr || outcome_.norm == 0));
  return true;
}

StepMemory Plan::host_memory() {
  StepMemory memory;
  memory.output.outcome = &outcome_;
  memory.taken = taken_.data();
  nonfinite_.clear();
  if (options_.nonfinite == NonfinitePolicy::raise) {
    nonfinite_.resize(tensors_.size());
    memory.nonfinite = nonfinite_.data();
  }
  return memory;
}

StepMemory Plan::device_memory(const DeviceMemory& given, const Scaling* scaling) {
  const int64_t count = static_cast<int64_t>(params_.size());
  const auto address = [&](const py::object& tensor, const char* name, DLDataTypeCode code, uint8_t bits,
                           int64_t numel) {
    return memory_of<void>(tensor, {kFunction, name, -1}, {static_cast<uint8_t>(code), bits, 1}, numel,
                           device_);
  };
  const auto number = [&](const py::object& tensor, const char* name) {
    return static_cast<const float*>(address(tensor, name, kDLFloat, 32, 1));
  };
  constexpr int64_t kDoubles = sizeof(Outcome) / sizeof(double);
  StepMemory memory;
  if (scaling != nullptr) memory.grad_scale = number(scaling->grad_scale_tensor, "grad_scale");
  if (scaling != nullptr) memory.found_inf = number(scaling->found_inf_tensor, "found_inf");
  memory.output.outcome = static_cast<Outcome*>(address(given.outcome, "outcome", kDLFloat, 64, kDoubles));
  memory.taken = static_cast<int32_t*>(address(given.taken, "taken", kDLInt, 32, count));
  memory.counts = static_cast<int64_t*>(address(given.counts, "counts", kDLInt, 64, 2));
  memory.nonfinite = static_cast<int64_t*>(address(given.nonfinite, "nonfinite", kDLInt, 64, count));
  memory.rounded_steps = static_cast<uint64_t*>(address(given.rounded_steps, "rounded_steps", kDLInt, 64, 1));
  if (memory.output.outcome == nullptr || memory.taken == nullptr) {
    throw py::type_error("step: memory: expected tensors 'outcome' and 'taken', got None");
  }
  return memory;
}

// torch gives freed memory to the stream that it was made on, whatever still runs on other streams but those
// that were recorded.
void Plan::record_stream(Stream stream) {
  if (device_memory_.empty() || stream.handle == memory_stream_) return;
  const py::object recorded = py::module_::import("torch.cuda").attr("current_stream")(stream.device);
  for (const py::object& tensor : device_memory_) tensor.attr("record_stream")(recorded);
  memory_stream_ = stream.handle;
}

void* Plan::scratch_of(const py::object& allocate, int64_t bytes, Stream stream) {
  std::vector<py::object> kept;
  void* const scratch = allocated(allocate, bytes, device_, kept);
  // A captured graph needs its memory to stay in place.
  if (!captured()) device_memory_.clear();
  device_memory_.push_back(std::move(kept.back()));
  memory_stream_ = stream.handle;
  return scratch;
}

// Counts a step of this plan; if the wrapped optimizer does the update, the caller counts.
void Plan::count_on_host(const py::list& param_groups, bool only_creates_state) {
  if (!updates() || outcome_.refused != 0) return;
  if (outcome_.skipped != 0) return count_steps(param_groups, kSkippedSteps, 1);
  if (outcome_.clipped != 0) count_steps(param_groups, kClippedSteps, 1);
  if (options_.rounding == Rounding::stochastic && !only_creates_state) {
    count_steps(param_groups, kRoundedSteps, 1);
  }
}

py::list Plan::active() const {
  py::list params(active_.size());
  for (size_t i = 0; i < active_.size(); ++i) params[i] = params_[active_[i]];
  return params;
}

void Plan::announce_step(bool writes_grads) const {
  if (writes_grads) announce_write(py::cast(grads_));
  if (!updates()) return;
  announce_write(active());
  if (!locals_.empty()) announce_write(py::cast(locals_));
}

int Plan::visit(visitproc visit, void* arg) const {
  for (const std::vector<py::object>& group : groups_) {
    for (const py::object& param : group) Py_VISIT(param.ptr());
  }
  for (const py::object& param : params_) Py_VISIT(param.ptr());
  for (const Kept& slot : slots_) {
    for (const py::object& object : slot.objects) Py_VISIT(object.ptr());
  }
  for (const py::object& grad : grads_) Py_VISIT(grad.ptr());
  return 0;
}

void Plan::clear() {
  groups_.clear();
  params_.clear();
  slots_.clear();
  found_.clear();
}

namespace {

void collect_garbage(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    return py::detail::is_holder_constructed(self) ? py::cast<const Plan&>(py::handle(self)).visit(visit, arg)
                                                   : 0;
  };
  type.tp_clear = [](PyObject* self) {
    if (py::detail::is_holder_constructed(self)) py::cast<Plan&>(py::handle(self)).clear();
    return 0;
  };
}

}  // namespace

void define_plan(py::module_& module) {
  // The classes are local to the module, since the emulated module has the same ones.
  py::class_<Outcome>(module, "Outcome", py::module_local())
      .def(py::init([](const py::object& record) {
             Device device;
             const Argument argument{"Outcome", "record", -1};
             constexpr int64_t kDoubles = sizeof(Outcome) / sizeof(double);
             return *memory_of<Outcome>(record, argument, {kDLFloat, 64, 1}, kDoubles, device);
           }),
           py::arg("record"))
      .def_readonly("norm", &Outcome::norm)
      .def_readonly("nonfinite", &Outcome::nonfinite)
      .def_property_readonly("refused", [](const Outcome& outcome) { return outcome.refused != 0; })
      .def_property_readonly("skipped", [](const Outcome& outcome) { return outcome.skipped != 0; })
      .def_property_readonly("spiked", [](const Outcome& outcome) { return outcome.spiked != 0; })
      .def_property_readonly("clipped", [](const Outcome& outcome) { return outcome.clipped != 0; });
  // The byte offsets of an outcome's parts, with which Python reads one on a device without waiting.
  using py::literals::operator""_a;
  module.attr("OUTCOME_OFFSETS") =
      py::dict("norm"_a = offsetof(Outcome, norm), "norm_float32"_a = offsetof(Outcome, norm_float32),
               "skipped"_a = offsetof(Outcome, skipped), "spiked"_a = offsetof(Outcome, spiked),
               "nonfinite"_a = offsetof(Outcome, nonfinite));
  module.attr("OUTCOME_BYTES") = sizeof(Outcome);
  py::class_<Plan> plan(module, "Plan", py::module_local(), py::custom_type_setup(collect_garbage));
  plan.def(py::init<const std::string&, bool, const py::list&, const py::list&, const py::dict&,
                    const py::dict&, const py::object&>(),
           py::arg("rule"), py::arg("fused"), py::arg("param_groups"), py::arg("slots"), py::arg("options"),
           py::arg("defaults"), py::arg("device"))
      .def("seal", &Plan::seal, py::arg("state"))
      .def("matches", &Plan::matches, py::arg("param_groups"), py::arg("state"))
      .def_property_readonly("captured", &Plan::captured)
      .def_property_readonly("outcome", [](const Plan& plan) { return plan.outcome(); })
      .def("nonfinite", &Plan::nonfinite)
      .def("active", &Plan::active)
      .def("active_indices", &Plan::active_indices);
  define(plan, "step", &Plan::step, py::arg("param_groups"), py::arg("state"),
         py::arg("scaling") = py::none(), py::arg("grads") = py::none(), py::arg("reduction") = py::none(),
         py::arg("clip_rows") = py::none(), py::arg("skip_row") = py::none(),
         py::arg("telemetry") = py::none(), py::arg("skips_nonfinite") = false,
         py::arg("creates_state") = false, py::arg("memory") = py::none());
}

}  // namespace steadygrad::bindings
