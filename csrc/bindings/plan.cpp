#include "bindings/plan.h"

#include <pybind11/stl.h>

#include "bindings/plan_options.h"
#include "bindings/signature.h"

namespace steadygrad::bindings {
namespace {

constexpr const char* kFunction = "step";

// The objects a state dict holds, in order: keys, inner dicts, values. Walking is cheaper than looking up.
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

Plan::Plan(const std::string& rule, const py::list& groups, const py::list& slots, const py::dict& options)
    : rule_(rule_named(rule)),
      options_(step_options(*rule_, options)),
      policies_(policies_of(options)),
      per_tensor_(options["per_tensor"].cast<bool>()) {
  for (const py::handle group : groups) {
    std::vector<py::object>& params = groups_.emplace_back();
    for (const py::handle param : group) {
      params.push_back(py::reinterpret_borrow<py::object>(param));
      params_.push_back(params.back());
    }
  }
  hints_.resize(params_.size());
  if (slots.size() != params_.size()) throw py::value_error("Plan: slots: expected one per parameter");
  for (const py::handle item : slots) {
    Slot& slot = slots_.emplace_back();
    if (item.is_none()) continue;
    const auto parts = item.cast<py::tuple>();
    slot.objects = parts[1].cast<std::vector<py::object>>();
    if (!parts[3].is_none()) slot.objects.push_back(parts[3]);
    slot.has_extra = !parts[3].is_none();
    for (const py::handle number : parts[0])
      slot.objects.push_back(py::reinterpret_borrow<py::object>(number));
    slot.first = parts[2].cast<bool>();
  }
}

void Plan::seal(const py::dict& state) {
  sealed_.clear();
  walk_state(state, [&](PyObject* object) {
    sealed_.push_back(object);
    return true;
  });
}

bool Plan::matches(const py::list& param_groups, const py::dict& state) const {
  if (static_cast<size_t>(PyList_GET_SIZE(param_groups.ptr())) != groups_.size()) return false;
  for (size_t g = 0; g < groups_.size(); ++g) {
    const py::object params = param_groups[g]["params"];
    if (!PyList_Check(params.ptr())) return false;
    if (static_cast<size_t>(PyList_GET_SIZE(params.ptr())) != groups_[g].size()) return false;
    for (size_t i = 0; i < groups_[g].size(); ++i) {
      if (PyList_GET_ITEM(params.ptr(), i) != groups_[g][i].ptr()) return false;
    }
  }
  size_t position = 0;
  const bool same = walk_state(
      state, [&](PyObject* object) { return position < sealed_.size() && sealed_[position++] == object; });
  return same && position == sealed_.size();
}

Argument Plan::argument(size_t index, const char* attribute) const {
  return {kFunction, "parameters", static_cast<Py_ssize_t>(index), attribute};
}

void Plan::prefetch(size_t index) const {
  if (index >= hints_.size()) return;
  for (const char* hint : hints_[index]) __builtin_prefetch(hint);
}

void Plan::remember(size_t index, const View* views, int count, PyObject* grad) {
  std::vector<const char*>& hints = hints_[index];
  if (!hints.empty() || device_.is_cuda()) return;
  const auto add = [&](const void* address, std::initializer_list<int> offsets) {
    for (const int offset : offsets) hints.push_back(static_cast<const char*>(address) + offset);
  };
  add(params_[index].ptr(), {0});
  add(grad, {0});
  for (const py::object& object : slots_[index].objects) add(object.ptr(), {0});
  // Sizes lie within the tensor's own object, about in its middle.
  for (int i = 0; i < count; ++i) add(views[i].sizes, {-64, 0, 64, 128});
  for (int i = 0; i < count; ++i) add(views[i].data, {0, 64});
}

int64_t Plan::scopes() const {
  return scope_of(options_.clip_scope, static_cast<int32_t>(groups_.size()) - 1,
                  static_cast<int32_t>(params_.size()) - 1) +
         1;
}

Reduction Plan::reduction_for(const py::object& reduction) {
  if (!reduction.is_none() && options_.clip_scope == ClipScope::tensor && !per_tensor_) {
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

bool Plan::add_tensor(size_t index, PyObject* grad, const GroupOptions& group, int32_t group_index) {
  const Slot& slot = slots_[index];
  const size_t states = state_count(options_.rule, group.hyper);
  if (slot.objects.size() != states + (slot.has_extra ? 1 : 0) + (rule_->has_step ? 1 : 0) + rule_->numbers)
    return false;
  const View grad_view = view_of(grad, argument(index, ".grad"), device_);
  const bool updates = options_.rule != RuleKind::none;
  if (!updates || options_.write_grads) check_writable(grad_view, argument(index, ".grad"));

  TensorOperands& tensor = tensors_.emplace_back();
  const bool penalty = group.l2 != 0 || (group.l1 != 0 && !options_.proximal);
  const bool by_unit = policies_.clip.kind == PolicyKind::adaptive && group.clipping != INFINITY;
  if (!updates && !penalty && !by_unit) {
    tensor = operands_of(grad_view, &TensorOperands::grad);
  } else {
    View views[3 + kMaxStates];
    Operand* operands[3 + kMaxStates] = {&tensor.param, &tensor.grad};
    int count = 2;
    PyObject* objects[3 + kMaxStates] = {local(params_[index]), grad};
    views[0] = view_of(objects[0], argument(index, ""), device_);
    views[1] = grad_view;
    if (updates) {
      check_writable(views[0], argument(index, ""));
      // A parameter whose dtype has changed has another slot.
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
      const bool is_resolved = i == 1 && reads_resolved_grads();
      if ((updates || penalty) && !is_resolved) check_not_negated(object, where);
      if (!same_sizes(views[0], views[i])) {
        throw py::value_error(where.text() + ": expected the shape of the parameter, " +
                              std::string(py::str(params_[index].attr("shape"))) + ", got " +
                              std::string(py::str(py::handle(object).attr("shape"))));
      }
    }
    set_operands(tensor, views, operands, count, by_unit);
    remember(index, views, count, grad);
  }
  tensor.group = group_index;
  tensor.place = static_cast<int32_t>(index);
  if (grad_view.is_complex && (tensor.grad.strides != nullptr || options_.norm_type.kind != NormKind::two)) {
    throw_type_error(argument(index, ".grad"),
                     "a real tensor, or a complex one that fills its memory and a 2-norm", grad);
  }
  cpu::StepCounter& counter = counters_.emplace_back();
  counter.first = slot.first;
  const auto number = [&](const py::object& object, const char* name) {
    const Argument where = argument(index, name);
    const View view = view_of(object.ptr(), where, device_);
    check_not_negated(object.ptr(), where);
    if (view.numel != 1 || (view.dtype != DType::float32 && view.dtype != DType::float64)) {
      throw_type_error(where, "a float32 or float64 tensor of one element", object.ptr());
    }
    return StateNumber{view.data, view.dtype};
  };
  auto object = slot.objects.end() - rule_->numbers - (rule_->has_step ? 1 : 0);
  if (rule_->has_step) counter.step = number(*object++, " state 'step'");
  for (int i = 0; i < rule_->numbers; ++i) counter.numbers[i] = number(*object++, " state");
  return true;
}

// Marks the plan as in use, and lets go of the gradients however the step ends.
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

bool Plan::gather(const std::vector<GroupOptions>& groups, const std::optional<py::list>& grads) {
  if (grads && grads->size() != params_.size())
    throw py::value_error("step: grads: expected one per parameter");
  static PyObject* const kGrad = PyUnicode_InternFromString("grad");
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
      py::object grad =
          grads ? py::object((*grads)[index])
                : py::reinterpret_steal<py::object>(PyObject_GetAttr(params_[index].ptr(), kGrad));
      if (!grad) throw py::error_already_set();
      if (grad.is_none()) continue;
      if (reads_resolved_grads()) grad = resolved(grad.ptr());
      if (!add_tensor(index, grad.ptr(), groups[g], static_cast<int32_t>(g))) return false;
      active_.push_back(static_cast<int64_t>(index));
      grads_.push_back(std::move(grad));
    }
  }
  return true;
}

std::optional<cpu::StepReport> Plan::step(const py::list& groups, double unscale, bool found_inf,
                                          const std::optional<py::list>& grads, uint64_t rounded_steps,
                                          const py::object& reduction, const py::object& policy_rows,
                                          const py::object& telemetry) {
  const std::vector<GroupOptions> group_list = group_options_of(groups, groups_.size());
  adopt_torch_threads();
  const Stepping stepping(*this);
  device_ = Device();
  device_.calls_python = !reduction.is_none();
  if (!gather(group_list, grads)) return std::nullopt;
  if (device_.is_cuda()) {
    throw py::type_error("step: parameters: expected tensors on the device that the step was prepared for");
  }
  options_.unscale = unscale;
  options_.found_inf = found_inf;
  options_.rounded_steps = rounded_steps;
  const Telemetry record = telemetry_of(telemetry, params_.size(), device_);
  const Reduction all = reduction_for(reduction);
  const Policies policies = with_rows(policies_, policy_rows, scopes(), device_);
  const auto announce = [&](const cpu::StepReport& decided) {
    const py::gil_scoped_acquire acquire;
    if (decided.grads_written) announce_write(py::cast(grads_));
    if (options_.rule != RuleKind::none) announce_update();
  };
  cpu::StepReport report;
  {
    const py::gil_scoped_release release;
    report =
        cpu::fused_step(tensors_, counters_, group_list, options_, announce, all, &active_, policies, record);
  }
  return report;
}

cuda::StepMemory Plan::step_memory(const py::dict& memory) {
  const int64_t count = static_cast<int64_t>(params_.size());
  const auto memory_at = [&](const char* name, DLDataTypeCode code, uint8_t bits, int64_t numel) {
    return memory_of<void>(memory[name], {kFunction, name, -1}, {static_cast<uint8_t>(code), bits, 1}, numel,
                           device_);
  };
  cuda::StepMemory addresses;
  addresses.output.outcome = static_cast<cuda::Outcome*>(memory_at("outcome", kDLFloat, 64, 3));
  addresses.counts = static_cast<int64_t*>(memory_at("counts", kDLInt, 64, 2));
  addresses.taken = static_cast<int32_t*>(memory_at("taken", kDLInt, 32, count));
  addresses.nonfinite = static_cast<int64_t*>(memory_at("nonfinite", kDLInt, 64, count));
  addresses.rounded_steps = static_cast<uint64_t*>(memory_at("rounded_steps", kDLInt, 64, 1));
  addresses.grad_scale = static_cast<const float*>(memory_at("grad_scale", kDLFloat, 32, 1));
  addresses.found_inf = static_cast<const float*>(memory_at("found_inf", kDLFloat, 32, 1));
  if (addresses.output.outcome == nullptr || addresses.taken == nullptr) {
    throw py::type_error("step: memory: expected tensors 'outcome' and 'taken', got None");
  }
  return addresses;
}

bool Plan::step_on_device(const py::list& groups, double unscale, bool found_inf,
                          const std::optional<py::list>& grads, const py::dict& memory,
                          const py::list& learning_rates, const py::object& allocate,
                          const py::object& reduction, const py::object& policy_rows,
                          const py::object& telemetry) {
  const std::vector<GroupOptions> group_list = group_options_of(groups, groups_.size());
  const Stepping stepping(*this);
  // Also a step without any gradient has a device and its stream.
  device_ = Device();
  cuda::StepMemory addresses = step_memory(memory);
  if (!gather(group_list, grads)) return false;
  std::vector<cuda::DeviceGroup> device_groups;
  for (size_t g = 0; g < group_list.size(); ++g) {
    cuda::DeviceGroup& group = device_groups.emplace_back();
    group.options = group_list[g];
    const py::object lr = learning_rates[g];
    if (lr.is_none()) continue;
    const Argument where{kFunction, "lr", static_cast<Py_ssize_t>(g)};
    const View view = view_of(lr.ptr(), where, device_);
    if (view.numel != 1 || (view.dtype != DType::float32 && view.dtype != DType::float64)) {
      throw_type_error(where, "a float32 or float64 tensor of one element", lr.ptr());
    }
    check_not_negated(lr.ptr(), where);
    group.lr = {view.data, view.dtype};
  }
  std::vector<cuda::StepCounter> counters;
  for (const cpu::StepCounter& counter : counters_) {
    counters.push_back({counter.step, {}});
    std::copy_n(counter.numbers, kMaxNumbers, counters.back().numbers);
  }
  const std::vector<int32_t> slots(active_.begin(), active_.end());
  addresses.policies = with_rows(policies_, policy_rows, scopes(), device_);
  addresses.telemetry = telemetry_of(telemetry, params_.size(), device_);
  options_.unscale = unscale;
  options_.found_inf = found_inf;
  if (options_.rule == RuleKind::none || options_.write_grads) announce_write(py::cast(grads_));
  if (options_.rule != RuleKind::none) announce_update();
  device_plan_.step(
      tensors_, counters, slots, device_groups, options_, addresses, reduction_for(reduction),
      [&](int64_t bytes) {
        std::vector<py::object> kept;
        void* const address = allocated(allocate, bytes, device_, kept);
        // What a captured graph uses must stay where it is.
        if (!captured()) device_memory_.clear();
        device_memory_.push_back(std::move(kept.back()));
        return address;
      },
      current_stream(device_));
  return true;
}

py::list Plan::active() const {
  py::list params(active_.size());
  for (size_t i = 0; i < active_.size(); ++i) params[i] = params_[active_[i]];
  return params;
}

void Plan::announce_update() const {
  announce_write(active());
  if (!locals_.empty()) announce_write(py::cast(locals_));
}

void Plan::mark_first_steps_done() {
  for (const int64_t index : active_) slots_[index].first = false;
}

int Plan::visit(visitproc visit, void* arg) const {
  for (const std::vector<py::object>& group : groups_) {
    for (const py::object& param : group) Py_VISIT(param.ptr());
  }
  for (const py::object& param : params_) Py_VISIT(param.ptr());
  for (const Slot& slot : slots_) {
    for (const py::object& object : slot.objects) Py_VISIT(object.ptr());
  }
  for (const py::object& grad : grads_) Py_VISIT(grad.ptr());
  return 0;
}

void Plan::clear() {
  groups_.clear();
  params_.clear();
  slots_.clear();
  hints_.clear();
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
  // Local to the module: the emulated one has the same classes.
  py::class_<cpu::StepReport>(module, "StepReport", py::module_local())
      .def_property_readonly("norm", [](const cpu::StepReport& report) { return report.norm.norm; })
      .def_property_readonly("nonfinite_count",
                             [](const cpu::StepReport& report) { return report.norm.nonfinite; })
      .def_readonly("nonfinite", &cpu::StepReport::nonfinite)
      .def_readonly("refused", &cpu::StepReport::refused)
      .def_readonly("skipped", &cpu::StepReport::skipped)
      .def_readonly("spiked", &cpu::StepReport::spiked)
      .def_readonly("clipped", &cpu::StepReport::clipped);
  py::class_<Plan> plan(module, "Plan", py::module_local(), py::custom_type_setup(collect_garbage));
  plan.def(py::init<const std::string&, const py::list&, const py::list&, const py::dict&>(), py::arg("rule"),
           py::arg("groups"), py::arg("slots"), py::arg("options"))
      .def("seal", &Plan::seal, py::arg("state"))
      .def("matches", &Plan::matches, py::arg("param_groups"), py::arg("state"))
      .def_property_readonly("captured", &Plan::captured)
      .def("active", &Plan::active)
      .def("active_indices", &Plan::active_indices)
      .def("mark_first_steps_done", &Plan::mark_first_steps_done);
  define(plan, "step", &Plan::step, py::arg("groups"), py::arg("unscale"), py::arg("found_inf"),
         py::arg("grads") = py::none(), py::arg("rounded_steps") = 0, py::arg("reduction") = py::none(),
         py::arg("policy_rows") = py::none(), py::arg("telemetry") = py::none());
  define(plan, "step_on_device", &Plan::step_on_device, py::arg("groups"), py::arg("unscale"),
         py::arg("found_inf"), py::arg("grads"), py::arg("memory"), py::arg("learning_rates"),
         py::arg("allocate"), py::arg("reduction") = py::none(), py::arg("policy_rows") = py::none(),
         py::arg("telemetry") = py::none());
  py::list fields;
  for (const char* field : kGroupFields) fields.append(field);
  module.attr("GROUP_FIELDS") = py::tuple(fields);
}

}  // namespace steadygrad::bindings
