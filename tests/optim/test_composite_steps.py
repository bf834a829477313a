"""Steps that no kernel takes: several devices, devices without kernels, complex parameters, no extension."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

import steadygrad as sg
from steadygrad import _kernels, composite, without_kernels
from tests.backends import COMPOSITE, Backend
from tests.foreign_tensors import Foreign, numbers, parameter
from tests.policies.python_policies import Median
from tests.tolerances import assert_close

DEVICES = [("cpu", "mps", "cpu", "xpu"), ("mps", "mps", "mps", "mps")]
SHAPES = [(7,), (3, 4), (), (5, 2, 3)]
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "limit": lambda: {"max_norm": 1.0},
    "penalties": lambda: {"max_norm": 1.0, "l1": 0.1, "l2": 0.2, "clip_value": 0.3},
    "after": lambda: {"max_norm": 1.0, "l1": 0.1, "l2": 0.2, "penalty_order": "after_clip"},
    "proximal": lambda: {"max_norm": 1.0, "l1": 0.1, "l1_mode": "proximal"},
    "by group": lambda: {"max_norm": 1.0, "clip_scope": "group", "norm_type": 1.0},
    "by tensor": lambda: {"max_norm": 1.0, "clip_scope": "tensor", "norm_type": math.inf},
    "zero": lambda: {"max_norm": 1.0, "nonfinite": "zero", "norm_type": 3.0},
    "percentile": lambda: {"clip": sg.ClipPercentile(50), "skip": sg.SkipSpikes(2.0, 4)},
    "relative": lambda: {"clip": sg.ClipRelative(warmup=2)},
    "by unit": lambda: {"clip": sg.ClipAdaptive(0.1)},
    "in Python": lambda: {"clip": Median()},
}


def parameters(devices: tuple[str, ...]) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        parameter(torch.randn(shape, generator=generator), device)
        for shape, device in zip(SHAPES, devices, strict=True)
    ]


def give(params: list[Parameter], step: int, broken: bool = False) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator) * 3.0 ** (step % 4)
        if broken and grad.ndim == 1:
            grad[2] = math.nan
        param.grad = grad if param.device.type == "cpu" else Foreign(grad, param.device)


def grouped(params: list[Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "max_norm": 0.5}]


@pytest.mark.parametrize("devices", DEVICES, ids=["several", "mps"])
@pytest.mark.parametrize("options", OPTIONS)
def test_steps_are_those_of_the_kernels(options: str, devices: tuple[str, ...]) -> None:
    make = OPTIONS[options]
    mine, theirs = parameters(devices), parameters(("cpu",) * 4)
    inner = torch.optim.AdamW(grouped(mine), lr=0.1)
    ours = sg.Stabilizer(inner, **make())
    twin = sg.Stabilizer(torch.optim.AdamW(grouped(theirs), lr=0.1), **make())
    for step in range(12):
        for params in (mine, theirs):
            give(params, step, broken=step == 5)
        ours.step()
        twin.step()
        assert ours.grad_norm.item() == pytest.approx(twin.grad_norm.item(), rel=1e-5, nan_ok=True)
    for one, other in zip(mine, theirs, strict=True):
        assert_close(numbers(one), other.detach(), torch.float32)
    assert ours.path.startswith("in-place: ") and twin.path == "fused"
    assert ours.clipped_steps == twin.clipped_steps > 0
    assert ours.skipped_steps == twin.skipped_steps
    history, wanted = ours.telemetry, twin.telemetry
    assert history is not None and wanted is not None
    for name in ("norm", "clipped_norm", "limit", "clipped", "skipped", "spiked", "nonfinite"):
        torch.testing.assert_close(
            torch.tensor(getattr(history, name)),
            torch.tensor(getattr(wanted, name)),
            rtol=1e-5,
            atol=1e-6,
            equal_nan=True,
        )


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_step_that_is_not_taken_changes_nothing(nonfinite: Any) -> None:
    params = parameters(DEVICES[0])
    optimizer = sg.Stabilizer(
        torch.optim.Adam(params, lr=0.1), max_norm=0.1, l2=0.5, nonfinite=nonfinite
    )
    give(params, 0)
    optimizer.step()
    give(params, 1, broken=True)
    kept = [numbers(t).clone() for p in params for t in (p, p.grad) if t is not None]
    counts = [float(optimizer.state[param]["step"]) for param in params]
    if nonfinite == "raise":
        with pytest.raises(sg.NonfiniteGradientError, match=r"got 1 non-finite ones in .*\(1\)"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.skipped_steps == 1
    assert [float(optimizer.state[param]["step"]) for param in params] == counts
    now = [numbers(t) for p in params for t in (p, p.grad) if t is not None]
    for one, other in zip(now, kept, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_a_gradient_that_is_refused_leaves_the_others_alone() -> None:
    params = parameters(DEVICES[0])
    give(params, 0)
    params.reverse()
    params[-1].grad = torch.full((1,), 30.0).expand(7)
    optimizer = sg.Stabilizer(torch.optim.AdamW(params, lr=0.1), max_norm=0.1)
    kept = [numbers(p.grad).clone() for p in params if p.grad is not None]
    with pytest.raises(
        ValueError, match=r"step: parameters\[3\].grad: expected .*expanded one; clone"
    ):
        optimizer.step()
    for param, before in zip(params, kept, strict=True):
        assert param.grad is not None and torch.equal(numbers(param.grad), before)
    assert not optimizer.state


@pytest.mark.parametrize("options", [{"norm_type": 1.0}, {"l1": 0.1, "l2": 0.2}], ids=["p", "l"])
def test_complex_parameters_take_every_norm_and_penalty(
    backend: Backend, options: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(6, generator=generator, dtype=torch.complex64).to(backend.device)
    mine, theirs = Parameter(values), Parameter(values.clone())
    ours = sg.Stabilizer(torch.optim.SGD([mine], lr=0.1, momentum=0.9), max_norm=1.0, **options)
    twin = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for _ in range(4):
        grad = torch.randn(6, generator=generator, dtype=torch.complex64).to(backend.device)
        mine.grad, theirs.grad = grad.clone(), grad.clone()
        ours.step()
        sg.add_penalty_([theirs], options.get("l1", 0.0), options.get("l2", 0.0))
        sg.clip_grad_norm_([theirs], 1.0, options.get("norm_type", 2.0))
        twin.step()
    torch.testing.assert_close(mine, theirs)
    assert ours.path == "in-place: complex parameters"


def test_what_only_kernels_do_is_refused_at_construction() -> None:
    params = parameters(DEVICES[1])
    with pytest.raises(ValueError, match=r"AdamW: rounding: expected 'nearest' .*no kernels for"):
        sg.optim.AdamW(params, rounding="kahan")
    with pytest.raises(ValueError, match=r"Stabilizer: state_dtype: expected None .*no kernels"):
        sg.Stabilizer(torch.optim.SGD(params), state_dtype=torch.float32)


def test_the_path_says_why_no_kernel_takes_the_parameters() -> None:
    def path(*devices: str) -> str:
        with FakeTensorMode(allow_non_fake_inputs=True):
            tensors = [torch.ones(2, device=device) for device in devices]
        return str(composite.why_no_kernel(tensors))

    assert path("cpu", "cpu") == "None"
    assert path("cpu", "mps") == path("mps") == "no kernels for mps in this build"
    with COMPOSITE.active():
        assert path("cpu") == "there is no compiled extension"
        optimizer = sg.optim.AdamW([Parameter(torch.ones(2))])
        assert optimizer.path == "in-place: there is no compiled extension"


def test_devices_with_kernels_are_told_when_they_are_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(composite, "has_kernels", lambda device: True)
    params = parameters(DEVICES[0])
    assert composite.why_no_kernel(params) == "parameters on several devices, cpu, mps, xpu"


def test_a_cuda_device_of_rocm_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kernels, "is_asynchronous", lambda device_type: device_type == "cuda")
    assert composite.has_kernels(torch.device("cuda"))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not composite.has_kernels(torch.device("cuda"))
    assert not sg.memory.is_asynchronous(torch.device("cuda"))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "clip",
    [
        sg.ClipPercentile(40, window=6),
        sg.ClipZScore(1.5, warmup=4),
        sg.ClipRelative(warmup=5),
        sg.Damp(0.5),
    ],
    ids=lambda clip: type(clip).__name__,
)
def test_a_policy_goes_on_where_kernels_have_left_it(clip: sg.ClipPolicy) -> None:
    def run(first: Any, second: Any) -> list[float]:
        norms: list[float] = []
        saved = None
        for begin, backend in ((0, first), (9, second)):
            with backend:
                param = Parameter(torch.zeros(3))
                inner = torch.optim.SGD([param], lr=1.0)
                optimizer = sg.Stabilizer(inner, clip=clip, skip=sg.SkipSpikes(1.5, 8))
                if saved is not None:
                    optimizer.load_state_dict(saved)
                for step in range(begin, begin + 9):
                    before = param.detach().clone()
                    param.grad = torch.full((3,), 1.0 + (step * 7) % 5 + 20 * (step % 8 == 7))
                    optimizer.step()
                    norms.append((param.detach() - before).norm().item())
                saved = optimizer.state_dict()
        return norms

    alone = run(nullcontext(), nullcontext())
    assert 0.0 in alone  # a spike was skipped
    assert run(nullcontext(), COMPOSITE.active()) == pytest.approx(alone, rel=1e-6)
    assert run(COMPOSITE.active(), nullcontext()) == pytest.approx(alone, rel=1e-6)


def test_what_stands_in_for_the_extension_has_its_numbers() -> None:
    for name, value in vars(without_kernels).items():
        if name.isupper() and name[0] != "_" and name not in ("DTYPES", "VERSION"):
            assert getattr(_kernels, name) == value, name
    for kind in ("percentile", "zscore", "relative", "damp", "given", "adaptive"):
        mine, theirs = (m.ClipPolicy(kind, window=7) for m in (without_kernels, _kernels))
        assert mine.row_size == theirs.row_size
    spikes = [m.SpikePolicy(sigma=1.0, window=7) for m in (without_kernels, _kernels)]
    assert spikes[0].row_size == spikes[1].row_size


def test_gradients_that_square_out_of_the_range_are_finite() -> None:
    with COMPOSITE.active():
        for size in (1e-30, 1e30):
            param = Parameter(torch.zeros(4))
            param.grad = torch.full((4,), size)
            optimizer = sg.Stabilizer(torch.optim.SGD([param], lr=1.0), max_norm=1e-31)
            optimizer.step()
            assert optimizer.skipped_steps == 0
            assert optimizer.grad_norm.item() == pytest.approx(2 * size)
        assert param.detach().tolist() == pytest.approx([-5e-32] * 4, rel=1e-4)
