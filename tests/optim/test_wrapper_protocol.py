"""What PyTorch's ecosystem expects of an optimizer: points 1 to 5, 7 and 8 of the wrapper protocol.

The mixed-precision points are in test_amp.py, the checkpoint points in test_checkpoints.py.
"""

from __future__ import annotations

import copy
import io
import pickle
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import steadygrad as sg
from tests.backends import Backend
from tests.optim.lr_schedules import SCHEDULERS, advance
from tests.optim.optimizer_kinds import MAKERS, WITH_STATE, give, make_twin
from tests.optim.optimizer_runs import assert_same_params, assert_same_state
from tests.optim.parameter_sets import dense_parameters
from tests.snapshots import assert_same_tree, bits
from tests.tolerances import assert_close

all_kinds = pytest.mark.parametrize("kind", MAKERS)
WRAPPED = [kind for kind in MAKERS if kind != "subclass"]


def step_both(mine: Any, theirs: Any, ours: Any, torchs: Any, seed: int) -> None:
    """Give both the same gradients and step them."""
    give(mine, seed)
    give(theirs, seed)
    ours.step()
    clip_grad_norm_(theirs, 1.0)
    torchs.step()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", WITH_STATE)
def test_point_1_schedulers_drive_it(backend: Backend, kind: str, name: str) -> None:
    mine, theirs = dense_parameters(), dense_parameters()
    ours, torchs = MAKERS[kind](mine, max_norm=1.0), make_twin(kind, theirs)
    schedules = [SCHEDULERS[name](ours), SCHEDULERS[name](torchs)]
    for seed in range(10):
        step_both(mine, theirs, ours, torchs, seed)
        for schedule in schedules:
            advance(name, schedule)
        group, other = ours.param_groups[0], torchs.param_groups[0]
        assert group["lr"] == other["lr"] and group["betas"] == other["betas"]
    assert_same_params(mine, theirs, torch.float32)
    assert schedules[0].get_last_lr() == schedules[1].get_last_lr()


@all_kinds
def test_point_1_it_is_an_optimizer_with_a_bound_step(backend: Backend, kind: str) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer.step, types.MethodType)
    assert optimizer.step.__self__ is optimizer and callable(optimizer.step.__func__)
    calls = []
    original = optimizer.step

    def counted(closure: Any = None) -> Any:
        calls.append(closure)
        return original(closure)

    optimizer.step = counted
    give(params)
    before = [bits(p) for p in params]
    optimizer.step()
    assert len(calls) == 1
    assert any(not torch.equal(bits(p), b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("kind", WRAPPED)
def test_point_1_a_scheduler_on_the_wrapped_optimizer(backend: Backend, kind: str) -> None:
    params = dense_parameters(device=backend.device)
    theirs = dense_parameters(device=backend.device)
    inner, torchs = make_twin(kind, params), make_twin(kind, theirs)
    schedules = [lr_scheduler.ExponentialLR(o, 0.5) for o in (inner, torchs)]
    optimizer = sg.Stabilizer(inner, max_norm=1.0)
    for seed in range(4):
        step_both(params, theirs, optimizer, torchs, seed)
        for schedule in schedules:  # a scheduler warns if it believes that there was no step
            schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05 / 16
    assert_same_params(params, theirs, torch.float32)


@pytest.mark.parametrize("kind", WRAPPED)
def test_point_2_hooks_of_both_run_once_and_in_order(backend: Backend, kind: str) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0)
    events: list[tuple[str, bool]] = []
    start = bits(params[0])

    def note(name: str, owner: Any) -> Any:
        def hook(which: Any, args: Any, kwargs: Any) -> None:
            assert which is owner
            events.append((name, torch.equal(bits(params[0]), start)))

        return hook

    inner = optimizer.optimizer
    optimizer.register_step_pre_hook(note("pre", optimizer))
    optimizer.register_step_post_hook(note("post", optimizer))
    inner.register_step_pre_hook(note("wrapped pre", inner))
    handle = inner.register_step_post_hook(note("wrapped post", inner))
    give(params)
    optimizer.step()
    assert events == [
        ("pre", True),
        ("wrapped pre", True),
        ("wrapped post", False),
        ("post", False),
    ]
    handle.remove()
    optimizer.step()
    assert [name for name, _ in events[4:]] == ["pre", "wrapped pre", "post"]


def test_point_2_hooks_of_the_subclass_run_once(backend: Backend) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS["subclass"](params, max_norm=1.0)
    events: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: events.append("pre"))
    optimizer.register_step_post_hook(lambda *_: events.append("post"))
    give(params)
    optimizer.step()
    assert events == ["pre", "post"]


@all_kinds
@pytest.mark.parametrize("returned", [True, "ab", [(), {}], torch.ones(2, 2)], ids=str)
def test_point_2_what_a_pre_hook_returns_is_checked(
    backend: Backend, kind: str, returned: Any
) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0)
    optimizer.register_step_pre_hook(lambda *_: returned)
    give(params)
    start = bits(params[0])
    with pytest.raises(RuntimeError, match=r"pre-hooks: expected None or a tuple of \(new_args"):
        optimizer.step()
    assert torch.equal(bits(params[0]), start)


@all_kinds
def test_point_2_a_profiler_sees_the_step_and_global_hooks_run_once(
    backend: Backend, kind: str
) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0)
    inner = getattr(optimizer, "optimizer", optimizer)
    seen: list[Any] = []
    handles = [
        register_optimizer_step_pre_hook(lambda which, args, kwargs: seen.append(which)),
        register_optimizer_step_post_hook(lambda which, args, kwargs: seen.append(which)),
    ]
    try:
        for seed in range(2):
            give(params, seed)
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU]
            ) as profile:
                optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [inner] * 4
    name = f"Optimizer.step#{type(inner).__name__}.step"
    assert [event.name for event in profile.events()].count(name) == 1
    give(params, 3)
    optimizer.step()
    assert len(seen) == 4


@pytest.mark.parametrize("kind", ["AdamW", "subclass"])
def test_a_plain_step_is_one_call_into_the_kernels(backend: Backend, kind: str) -> None:
    """Check that a plain step is two calls to the kernels, a few of our functions deep."""
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0)
    calls: list[tuple[str, int]] = []

    def note(frame: Any, event: str, function: Any) -> None:
        if event == "c_call" and getattr(function, "__name__", "") == "step":
            depth = 0
            while frame is not None and frame.f_code.co_filename != __file__:
                depth, frame = depth + 1, frame.f_back
            calls.append((type(function.__self__).__name__, depth))

    for seed in range(3):
        give(params, seed)
        sys.setprofile(note if seed == 2 else None)
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
    # These are Stabilizer.step or AdamW.step, Stepper.step and Stepper._run.
    assert len(calls) == 1 and calls[0][1] == 3


@all_kinds
def test_point_2_hook_dicts_exist(backend: Backend, kind: str) -> None:
    optimizer = MAKERS[kind](dense_parameters(device=backend.device), max_norm=1.0)
    plain = vars(torch.optim.SGD([Parameter(torch.ones(1))], lr=0.1))
    for name in (name for name in plain if name.endswith("_hooks")):
        assert isinstance(getattr(optimizer, name), dict), name


@all_kinds
def test_point_2_state_dict_hooks_run(backend: Backend, kind: str) -> None:
    optimizer = MAKERS[kind](dense_parameters(device=backend.device), max_norm=1.0)
    events: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: events.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, state: events.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: events.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda _: events.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert events == ["save", "saved", "load", "loaded"]


@pytest.mark.parametrize("kind", WRAPPED)
def test_point_3_properties_pass_through(backend: Backend, kind: str) -> None:
    params = dense_parameters(device=backend.device)
    optimizer = MAKERS[kind](params, max_norm=1.0)
    inner = optimizer.optimizer
    for name in ("param_groups", "state", "defaults"):
        assert getattr(optimizer, name) is getattr(inner, name)
        replacement = copy.copy(getattr(inner, name))
        setattr(optimizer, name, replacement)
        assert getattr(inner, name) is replacement is getattr(optimizer, name)
    give(params)
    before = bits(params[0])
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": params[1:]}]
    optimizer.step()
    assert torch.equal(bits(params[0]), before)
    assert all(
        float(inner.state[p]["step"]) == (p is not params[0])
        for p in inner.state
        if "step" in inner.state[p]
    )


@all_kinds
def test_point_3_loading_rebinds_and_the_next_step_sees_it(backend: Backend, kind: str) -> None:
    mine, theirs = dense_parameters(), dense_parameters()
    ours, torchs = MAKERS[kind](mine, max_norm=1.0), make_twin(kind, theirs)
    for seed in range(3):
        step_both(mine, theirs, ours, torchs, seed)
    for optimizer in (ours, torchs):
        state = copy.deepcopy(optimizer.state_dict())
        for group in state["param_groups"]:
            group["lr"] = 0.01
        for entries in state["state"].values():
            for value in entries.values():
                if isinstance(value, Tensor) and value.dim():
                    value.mul_(4.0)
        optimizer.load_state_dict(state)
    for seed in range(3, 6):
        step_both(mine, theirs, ours, torchs, seed)
    assert_same_params(mine, theirs, torch.float32)
    assert_same_state(ours, torchs, torch.float32)


@all_kinds
def test_point_4_a_replaced_parameter_is_followed(backend: Backend, kind: str) -> None:
    mine, theirs = dense_parameters(), dense_parameters()
    ours, torchs = MAKERS[kind](mine, max_norm=1.0), make_twin(kind, theirs)
    step_both(mine, theirs, ours, torchs, 0)
    old, old_bits = mine[1], bits(mine[1])
    for params, optimizer in ((mine, ours), (theirs, torchs)):
        params[1] = Parameter(torch.full((17,), 3.0))
        optimizer.param_groups[0]["params"][1] = params[1]
        if kind == "Adagrad":  # torch's Adagrad needs the state that its constructor makes
            optimizer.state[params[1]] = {"step": torch.tensor(0.0), "sum": torch.zeros(17)}
    for seed in range(1, 4):
        step_both(mine, theirs, ours, torchs, seed)
    assert torch.equal(bits(old), old_bits)
    assert_same_params(mine, theirs, torch.float32)


@all_kinds
def test_point_4_swapped_storage_is_followed(backend: Backend, kind: str) -> None:
    mine, theirs = dense_parameters(), dense_parameters()
    ours, torchs = MAKERS[kind](mine, max_norm=1.0), make_twin(kind, theirs)
    step_both(mine, theirs, ours, torchs, 0)
    kept = [(p.data, bits(p.data)) for p in mine]
    for param in (*mine, *theirs):
        # The layout changes, too: channels_last becomes contiguous.
        param.data = param.data.clone(memory_format=torch.contiguous_format) * 2
    for seed in range(1, 4):
        step_both(mine, theirs, ours, torchs, seed)
    assert_same_params(mine, theirs, torch.float32)
    assert_same_state(ours, torchs, torch.float32)
    assert all(torch.equal(bits(data), old) for data, old in kept), "freed memory was written"


@all_kinds
def test_point_4_swapped_state_is_followed(backend: Backend, kind: str) -> None:
    mine, theirs = dense_parameters(), dense_parameters()
    ours, torchs = MAKERS[kind](mine, max_norm=1.0), make_twin(kind, theirs)
    step_both(mine, theirs, ours, torchs, 0)
    for optimizer in (ours, torchs):
        for entries in optimizer.state.values():
            for key, value in entries.items():
                if isinstance(value, Tensor) and value.dim():
                    entries[key] = value * 0.25
    step_both(mine, theirs, ours, torchs, 1)
    for optimizer in (ours, torchs):
        optimizer.state.clear()
    if kind != "Adagrad":  # torch's Adagrad needs the state that its constructor makes
        step_both(mine, theirs, ours, torchs, 2)
    assert_same_params(mine, theirs, torch.float32)
    assert_same_state(ours, torchs, torch.float32)


# torch's Adagrad makes its state in the constructor, before the move.
@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "Adagrad"])
def test_point_4_a_module_moved_to_another_dtype(backend: Backend, kind: str) -> None:
    def run(make: Any, clip: bool) -> list[Parameter]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
        optimizer = make(model.parameters())
        model.to(torch.float64)  # before the first step
        params = list(model.parameters())
        for seed in range(3):
            give(params, seed)
            if clip:
                clip_grad_norm_(params, 1.0)
            optimizer.step()
        return params

    mine = run(lambda params: MAKERS[kind](params, max_norm=1.0), clip=False)
    theirs = run(lambda params: make_twin(kind, params), clip=True)
    assert all(p.dtype == torch.float64 for p in mine)
    assert_same_params(mine, theirs, torch.float64)


@pytest.mark.parametrize("rule", ["SGD", "AdamW", "Adagrad", "RMSprop"])
def test_point_4_a_module_moved_in_the_middle_is_right_or_refused(
    backend: Backend, rule: str
) -> None:
    mine, exact = dense_parameters(), dense_parameters(torch.float64)
    options = {"momentum": 0.9} if rule in ("SGD", "RMSprop") else {}
    optimizer = sg.Stabilizer(getattr(torch.optim, rule)(mine, lr=0.01, **options), max_norm=1.0)
    reference = getattr(torch.optim, rule)(exact, lr=0.01, **options)
    for seed in range(5):
        if seed == 2:
            for param in mine:
                param.grad, param.data = None, param.data.double()
        give(mine, seed)
        give(exact, seed)
        clip_grad_norm_(exact, 1.0)
        reference.step()
        before = [bits(p) for p in mine]
        try:
            optimizer.step()
        except (TypeError, ValueError, RuntimeError) as refusal:
            # torch's own rules refuse it, too: the state has one dtype, the gradient another.
            assert seed == 2 and "float32" in str(refusal) and "float64" in str(refusal)
            assert all(torch.equal(bits(p), b) for p, b in zip(mine, before, strict=True))
            return
    for one, other in zip(mine, exact, strict=True):
        assert_close(one, other, torch.float32)


@all_kinds
def test_point_4_names_are_kept(backend: Backend, kind: str) -> None:
    model = torch.nn.Linear(3, 2).to(backend.device)
    optimizer = MAKERS[kind](model.named_parameters(), max_norm=1.0)
    give(list(model.parameters()))
    optimizer.step()
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


@all_kinds
def test_point_5_the_closure_runs_first_with_gradients_enabled(backend: Backend, kind: str) -> None:
    mine, theirs = dense_parameters(), dense_parameters()
    ours, torchs = MAKERS[kind](mine, max_norm=1.0), make_twin(kind, theirs)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        ours.zero_grad()
        loss = sum((p**2).sum() for p in mine) * 10.0
        loss.backward()
        return loss

    for _ in range(3):
        with torch.no_grad():
            loss = ours.step(closure)
        want = sum((p**2).sum() for p in theirs) * 10.0
        torchs.zero_grad()
        want.backward()
        clip_grad_norm_(theirs, 1.0)
        torchs.step()
        assert_close(loss, want, torch.float32)
    assert calls == [True] * 3
    assert ours.clipped_steps == 3
    assert_same_params(mine, theirs, torch.float32)
    assert ours.step() is None


def copies(kind: str, how: str) -> tuple[list[Parameter], Any, list[Parameter], Any]:
    """Return parameters and optimizer after three steps, and copies of both."""
    params = dense_parameters()
    optimizer = MAKERS[kind](params, max_norm=1.0, l2=1e-3, clip_scope="tensor")
    lr_scheduler.StepLR(optimizer, 5)  # patches step
    for seed in range(3):
        give(params, seed)
        optimizer.step()
    if how == "deepcopy":
        other, copied = copy.deepcopy((params, optimizer))
    elif how == "pickle":
        other, copied = pickle.loads(pickle.dumps((params, optimizer)))
    else:
        buffer = io.BytesIO()
        torch.save((params, optimizer), buffer)
        buffer.seek(0)
        other, copied = torch.load(buffer, weights_only=False)
    return params, optimizer, other, copied


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@all_kinds
def test_point_8_copies_continue_bit_equal(backend: Backend, kind: str, how: str) -> None:
    params, optimizer, other, copied = copies(kind, how)
    assert type(copied) is type(optimizer)
    assert copied.param_groups[0]["params"][0] is other[0] is not params[0]
    assert copied.clipped_steps == optimizer.clipped_steps == 3
    for seed in range(3, 7):
        for some, stepped in ((params, optimizer), (other, copied)):
            give(some, seed)
            stepped.step()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(params, other, strict=True))
    assert_same_tree(copied.state_dict(), optimizer.state_dict())
    assert torch.equal(copied.grad_norm, optimizer.grad_norm)
    assert copied.path == optimizer.path


@all_kinds
def test_point_8_setstate_takes_partial_dicts(backend: Backend, kind: str) -> None:
    params = dense_parameters()
    optimizer = MAKERS[kind](params, max_norm=1.0)
    give(params)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.__setstate__({})
    optimizer.__setstate__({"param_groups": optimizer.param_groups})
    optimizer.__setstate__({"state": optimizer.state})
    optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})
    assert_same_tree(optimizer.state_dict(), before)
    # torch's load_state_dict calls it like this: with new lists and dicts, without our keys in the groups.
    ours = {"max_norm", "clip_value", "l1", "l2", "skipped_steps", "clipped_steps"}
    groups = [{k: v for k, v in group.items() if k not in ours} for group in optimizer.param_groups]
    optimizer.__setstate__({"state": optimizer.state, "param_groups": groups})
    theirs = [Parameter(p.detach().clone()) for p in params]
    torchs = make_twin(kind, theirs)
    torchs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step_both(params, theirs, optimizer, torchs, 1)
    assert_same_params(params, theirs, torch.float32)


@all_kinds
def test_point_3_add_param_group(backend: Backend, kind: str) -> None:
    mine, theirs = dense_parameters(), dense_parameters()
    ours, torchs = MAKERS[kind](mine[:2], max_norm=1.0), make_twin(kind, theirs[:2])
    ours.add_param_group({"params": mine[2:], "lr": 0.01})
    torchs.add_param_group({"params": theirs[2:], "lr": 0.01})
    for seed in range(3):
        step_both(mine, theirs, ours, torchs, seed)
    assert ours.param_groups[1]["max_norm"] == 1.0
    assert ours.clipped_steps == ours.param_groups[1]["clipped_steps"] == 3
    assert_same_params(mine, theirs, torch.float32)
    with pytest.raises(ValueError, match="more than one parameter group"):
        ours.add_param_group({"params": mine[:1]})


@all_kinds
@pytest.mark.parametrize("set_to_none", [True, False])
def test_point_1_zero_grad(backend: Backend, kind: str, set_to_none: bool) -> None:
    params = dense_parameters()
    optimizer = MAKERS[kind](params, max_norm=1.0)
    give(params)
    optimizer.zero_grad(set_to_none=set_to_none)
    for param in params:
        assert param.grad is None if set_to_none else not param.grad.any()


@pytest.mark.parametrize("kind", ["AdamW", "subclass", "in-place"])
def test_what_is_the_optimizers_stays_when_its_first_group_goes(
    backend: Backend, kind: str
) -> None:
    params = [Parameter(torch.zeros(1, device=backend.device)) for _ in range(2)]
    optimizer = MAKERS[kind]([{"params": params[:1]}], max_norm=1.0)

    def step(value: float) -> None:
        for param in params:
            param.grad = torch.full_like(param, value)
        optimizer.step()

    for value in (torch.nan, torch.nan, 9.0):
        step(value)
    optimizer.add_param_group({"params": params[1:]})
    del optimizer.param_groups[0]
    optimizer.state.pop(params[0], None)  # torch could not save it
    assert (optimizer.skipped_steps, optimizer.clipped_steps) == (2, 1)
    step(torch.nan)
    assert (optimizer.skipped_steps, optimizer.clipped_steps) == (3, 1)
    assert optimizer.report().history.step[-1] == 3
    group = optimizer.state_dict()["param_groups"][0]
    assert (group["skipped_steps"], group["recorded_steps"]) == (3, 4)


def test_the_repr_lists_what_differs_from_the_defaults() -> None:
    sgd = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    assert repr(sg.Stabilizer(sgd)) == f"Stabilizer(\n{sgd!r})"
    opt = sg.Stabilizer(sgd, max_norm=1.0, nonfinite="zero", telemetry=None)
    start = "Stabilizer(max_norm=1.0, nonfinite='zero', telemetry=None,\nSGD ("
    assert repr(opt).startswith(start)
