"""Checks that the kernels handle every kind of tensor correctly, or refuse it in words and leave it unchanged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

import steadygrad as sg
from tests.backends import BACKENDS, Backend, backend_parameters
from tests.optim.parameter_sets import with_gradients
from tests.snapshots import Snapshot, assert_refused, bits
from tests.tolerances import assert_close

REFUSALS = (TypeError, ValueError, RuntimeError)


class Subclass(torch.Tensor):
    """A tensor type whose operations are not the kernels'."""


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.full((7,), 50.0)


def freed() -> Tensor:
    values = torch.full((7,), 50.0)
    values.untyped_storage().resize_(0)
    return values


# By name: how a bad tensor is made, what the message says was expected, and what it got.
BAD: dict[str, tuple[Callable[[], Tensor], str, str]] = {
    "integer": (lambda: torch.full((7,), 50), "float", "int64"),
    "boolean": (lambda: torch.ones(7, dtype=torch.bool), "float", "bool"),
    "float8": (lambda: torch.ones(7).to(torch.float8_e4m3fn), "float", "float8"),
    "sparse": (lambda: torch.full((7,), 50.0).to_sparse(), "dense|strided", "sparse"),
    "sparse-csr": (lambda: torch.eye(7).to_sparse_csr(), "dense|strided", "sparse"),
    "fake": (fake, r"torch\.Tensor", "FakeTensor"),
    "subclass": (lambda: torch.ones(7).as_subclass(Subclass), r"torch\.Tensor", "Subclass"),
    "freed": (freed, "memory|storage", "freed|null|released"),
}
# autograd accepts some of these as the gradient of a parameter; the others are set by hand.
FUNCTIONS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "get_total_norm": ("tensors", lambda ts: sg.get_total_norm(ts)),
    "clip_grad_norm_": ("parameters", lambda ps: sg.clip_grad_norm_(ps, 1.0)),
    "clip_grads_with_norm_": (
        "parameters",
        lambda ps: sg.clip_grads_with_norm_(ps, 1.0, torch.tensor(9.0)),
    ),
    "clip_grad_value_": ("parameters", lambda ps: sg.clip_grad_value_(ps, 1.0)),
    "add_penalty_": ("params", lambda ps: sg.add_penalty_(ps, 0.5, 0.5)),
    "soft_threshold_": ("params", lambda ps: sg.soft_threshold_(ps, 0.5)),
}
TAKES_TENSORS = ("get_total_norm", "soft_threshold_")


def carrier(gradient: Tensor) -> Tensor:
    """Return a tensor whose ``.grad`` is the given one, of any kind."""
    if gradient.layout == torch.strided:
        tensor = torch.empty_like(gradient)
    elif gradient.layout == torch.sparse_coo:
        tensor = gradient.to_dense()
    else:  # no other tensor may carry it
        tensor = gradient.clone()
    tensor.grad = gradient
    return tensor


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_bad_tensors_are_refused_and_nothing_changes(
    backend: Backend, function: str, kind: str
) -> None:
    make, expected, got = BAD[kind]
    argument, call = FUNCTIONS[function]
    good = with_gradients([torch.full((9,), 50.0, device=backend.device) for _ in range(2)])
    with torch.no_grad():
        for param in good:
            param.fill_(3.0)
    bad = make()
    if function not in TAKES_TENSORS:
        bad = carrier(bad)
    listed = [good[0], bad, good[1]]
    if function == "get_total_norm":
        listed = [good[0].grad, bad, good[1].grad]  # type: ignore[list-item]
    assert_refused(
        lambda: call(listed),
        REFUSALS,
        function=function,
        argument=argument,
        expected=f"expected.*({expected})",
        got=f"got.*({got})",
        unchanged=[Snapshot(good)],
    )


@pytest.mark.parametrize(
    "wrong", ["weight", 3.0, object(), None, np.ones(2)], ids=lambda wrong: type(wrong).__name__
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_no_tensor_is_refused(backend: Backend, function: str, wrong: object) -> None:
    argument, call = FUNCTIONS[function]
    good = with_gradients([torch.full((9,), 50.0, device=backend.device)])
    for listed in ([*good, wrong], wrong):
        assert_refused(
            lambda listed=listed: call(listed),
            TypeError,
            function=function,
            argument=argument,
            expected="expected.*tensor",
            # An array in the place of the list is one of numbers.
            got=f"got.*({type(wrong).__name__}|float64)",
            unchanged=[Snapshot(good)],
        )


@pytest.mark.parametrize(
    ("function", "arguments", "argument"),
    [
        ("clip_grad_norm_", ("a",), "max_norm"),
        ("clip_grad_norm_", (None,), "max_norm"),
        ("clip_grad_norm_", (1.0, "two"), "norm_type"),
        ("clip_grads_with_norm_", ("a", torch.tensor(1.0)), "max_norm"),
        ("clip_grads_with_norm_", (1.0, "a"), "total_norm"),
        ("clip_grad_value_", ([],), "clip_value"),
        ("add_penalty_", ("a",), "l1"),
        ("add_penalty_", (0.0, None), "l2"),
        ("soft_threshold_", ("a",), "amount"),
        ("clip_grad_norm_", (10**400,), "max_norm"),
        ("clip_grad_norm_", (1.0, -(10**400)), "norm_type"),
        ("clip_grads_with_norm_", (1.0, 10**400), "total_norm"),
        ("clip_grad_value_", (10**400,), "clip_value"),
        ("add_penalty_", (10**400,), "l1"),
        ("soft_threshold_", (10**400,), "amount"),
    ],
)
def test_numbers_that_are_none_are_refused(
    backend: Backend, function: str, arguments: tuple[Any, ...], argument: str
) -> None:
    params = with_gradients([torch.full((9,), 50.0, device=backend.device)])
    snapshot = Snapshot(params)
    with pytest.raises((TypeError, ValueError)) as raised:
        getattr(sg, function)(params, *arguments)
    assert function in str(raised.value) and argument in str(raised.value)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f != "get_total_norm"])
def test_inference_tensors_are_written_like_others(backend: Backend, function: str) -> None:
    # Autograd cannot save inference tensors, so there is no graph that a write could make wrong.
    _, call = FUNCTIONS[function]
    with torch.inference_mode():
        inferred = torch.full((5,), 50.0, device=backend.device)
    ordinary = torch.full((5,), 50.0, device=backend.device)
    for values in (inferred, ordinary):
        tensor: Tensor = values
        if function != "soft_threshold_":
            tensor = Parameter(torch.ones(5, device=backend.device))
            tensor.grad = values
        call([tensor])
    assert not torch.equal(ordinary, torch.full((5,), 50.0, device=backend.device))
    assert torch.equal(bits(inferred), bits(ordinary))


def test_inference_tensors_can_be_read_and_in_inference_mode_written(backend: Backend) -> None:
    with torch.inference_mode():
        values = torch.full((4,), 50.0, device=backend.device)
        holder = torch.zeros(4, device=backend.device)
        holder.grad = values
        assert sg.clip_grad_norm_([holder], 10.0).item() == 100.0
        assert_close(values, torch.full((4,), 5.0), torch.float32)
    assert sg.get_total_norm([values]).item() == pytest.approx(10.0)


def test_two_freed_parameters_do_not_share_memory(backend: Backend) -> None:
    params = [Parameter(torch.ones(3, device=backend.device)) for _ in range(2)]
    optimizer = sg.Stabilizer(torch.optim.AdamW(params), max_norm=1.0)
    for param in params:
        param.grad = torch.ones(3, device=backend.device)
        param.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage was freed"):
        optimizer.step()


def test_zeros_without_memory_are_named(backend: Backend) -> None:
    zeros = torch._efficientzerotensor((3,), device=backend.device)
    with pytest.raises(RuntimeError, match=r"efficientzerotensor.*clone"):
        sg.get_total_norm([zeros])


def test_empty_complex_tensors_of_any_strides(backend: Backend) -> None:
    made = torch.empty(0, 4, dtype=torch.complex64, device=backend.device)[:, ::2]
    holder = torch.empty_like(made)
    holder.grad = made
    assert sg.get_total_norm([made]).item() == sg.clip_grad_norm_([holder], 1.0).item() == 0


def test_parameters_that_are_views_of_one_buffer(backend: Backend) -> None:
    def build() -> tuple[Tensor, list[Parameter]]:
        flat = torch.linspace(-1, 1, 60, device=backend.device)
        gradient = torch.linspace(3, -3, 60, device=backend.device)
        params = [Parameter(flat[:11]), Parameter(flat[11:51].view(5, 8)), Parameter(flat[51:])]
        for param, piece in zip(params, gradient.split([11, 40, 9]), strict=True):
            param.grad = piece.view(param.shape)
        return flat, params

    (mine, my_params), (theirs, their_params) = build(), build()
    ours = sg.Stabilizer(torch.optim.AdamW(my_params, lr=0.1), max_norm=1.0)
    torchs = torch.optim.AdamW(their_params, lr=0.1)
    for _ in range(3):
        ours.step()
        norm = torch.nn.utils.get_total_norm([p.grad for p in their_params if p.grad is not None])
        clipped = [p.grad for p in their_params]
        for param in their_params:
            assert param.grad is not None
            param.grad = param.grad / (norm + 1e-6)
        torchs.step()
        for param, gradient in zip(their_params, clipped, strict=True):
            param.grad = gradient
    assert ours.path == "fused"
    assert_close(mine, theirs, torch.float32)


def test_one_gradient_of_two_parameters(backend: Backend) -> None:
    shared = torch.full((8,), 0.25, device=backend.device)
    mine = [Parameter(torch.full((8,), value, device=backend.device)) for value in (1.0, 2.0)]
    for param in mine:
        param.grad = shared
    ours = sg.Stabilizer(torch.optim.SGD(mine, lr=1.0), max_norm=100.0)
    ours.step()
    assert ours.grad_norm is not None and ours.grad_norm.item() == pytest.approx(1.0)
    assert [p[0].item() for p in mine] == [0.75, 1.75] and torch.all(shared == 0.25)


def test_an_expanded_gradient_in_a_step(backend: Backend) -> None:
    # The gradient is expanded from one element, as x.sum() can leave it; it is only read.
    param = Parameter(torch.zeros(3, 5, device=backend.device))
    param.grad = torch.full((1,), 2.0, device=backend.device).expand(3, 5)
    optimizer = sg.Stabilizer(torch.optim.SGD([param], lr=1.0), max_norm=1.0)
    snapshot = Snapshot([param], optimizer)
    try:
        optimizer.step()
    except REFUSALS as refusal:
        assert "grad" in str(refusal)
        snapshot.assert_unchanged()
    else:
        assert_close(param, torch.full((3, 5), -(15**-0.5)), torch.float32)


def test_an_expanded_parameter_is_refused(backend: Backend) -> None:
    param = Parameter(torch.ones(1, device=backend.device).expand(6))
    for call in (
        lambda: sg.soft_threshold_([param], 0.5),
        lambda: sg.Stabilizer(torch.optim.SGD([param], lr=1.0), max_norm=1.0).step(),
    ):
        param.grad = torch.full((6,), 3.0, device=backend.device)
        snapshot = Snapshot([param])
        with pytest.raises(REFUSALS):
            call()
        snapshot.assert_unchanged()


def large_zeros(device: torch.device) -> Tensor:
    """Return more than 2**31 zeros, which take no memory on the host until they are written."""
    return torch.from_numpy(np.zeros(2**31 + 12_345, np.uint16)).view(torch.bfloat16).to(device)


# The emulator would take half a minute: tests/emulation/features.cu looks for elements of large tensors instead.
@pytest.mark.parametrize(
    "backend", backend_parameters([b for b in BACKENDS if b.name != "emulated"])
)
@pytest.mark.full
def test_more_than_two_to_the_31_elements(backend: Backend) -> None:
    values = large_zeros(backend.device)
    values[7], values[-7] = 3.0, 4.0
    assert sg.get_total_norm([values]).item() == pytest.approx(5.0)
    # This tensor is large without using memory, since every row is the same one.
    rows = values[: 2**15 + 1].expand(2**16 + 1, 2**15 + 1)
    want = 3.0 * math.sqrt(2**16 + 1)
    assert sg.get_total_norm([rows]).item() == pytest.approx(want, rel=2.0**-23)


def test_elements_that_lie_far_apart(backend: Backend) -> None:
    values = large_zeros(backend.device).as_strided((2, 3), (2**31 + 5, 2))
    values.copy_(torch.arange(6).view(2, 3))
    (param,) = with_gradients([values])
    assert sg.clip_grad_norm_([param], 1.0).item() == pytest.approx(math.sqrt(55))
    want = torch.arange(6).view(2, 3).div(math.sqrt(55)).bfloat16()
    assert_close(values.float(), want, torch.float32)


def test_tensors_of_many_dimensions(backend: Backend) -> None:
    values = torch.randn(*[1] * 20, 2, 3, *[1] * 10, 2, device=backend.device)
    (param,) = with_gradients([values.transpose(20, 21)])
    want = values.double().norm().item()
    assert sg.clip_grad_norm_([param], want / 2).item() == pytest.approx(want)
    assert sg.get_total_norm([values]).item() == pytest.approx(want / 2)


def test_gradients_of_other_dtypes_than_the_parameter(backend: Backend) -> None:
    param = Parameter(torch.zeros(8, dtype=torch.bfloat16, device=backend.device))
    param.grad_dtype = torch.float32
    param.grad = torch.full((8,), 3.0, device=backend.device)
    assert sg.clip_grad_norm_([param], 1.0).item() == pytest.approx(3 * math.sqrt(8))
    assert_close(param.grad, torch.full((8,), 8**-0.5), torch.float32)
    param.grad.fill_(3.0)
    optimizer = sg.Stabilizer(torch.optim.SGD([param], lr=1.0), max_norm=1.0)
    snapshot = Snapshot([param], optimizer)
    try:
        optimizer.step()
    except REFUSALS as refusal:
        assert "bfloat16" in str(refusal) and "float32" in str(refusal)
        snapshot.assert_unchanged()
    else:
        assert_close(param, torch.tensor(-(8**-0.5)).bfloat16().expand(8), torch.float32)


@pytest.mark.parametrize("wrap", [True, False], ids=["wrapped", "subclass"])
def test_a_freed_gradient_without_a_learning_rate(backend: Backend, wrap: bool) -> None:
    param = Parameter(torch.ones(5, device=backend.device))
    param.grad = torch.ones(5, device=backend.device)
    param.grad.untyped_storage().resize_(0)
    optimizer = (
        sg.Stabilizer(torch.optim.SGD([param], lr=0.0), max_norm=0.0, l2=1.0)
        if wrap
        else sg.optim.SGD([param], lr=0.0, max_norm=0.0, l2=1.0)
    )
    with pytest.raises(RuntimeError, match="storage was freed"):
        optimizer.step()


ISLANDS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 31, 127, 1023, 1027)
CALLS: dict[str, Callable[[list[Parameter]], object]] = {
    "clip_grad_norm_": lambda params: sg.clip_grad_norm_(params, 1.0),
    "clip_grad_value_": lambda params: sg.clip_grad_value_(params, 0.1),
    "add_penalty_": lambda params: sg.add_penalty_(params, l1=0.1, l2=0.1),
    "soft_threshold_": lambda params: sg.soft_threshold_(params, 0.1),
    "SGD": lambda params: sg.optim.SGD(params, lr=0.1, momentum=0.9, max_norm=1.0).step(),
    "AdamW": lambda params: sg.optim.AdamW(params, lr=0.1, max_norm=1.0, l1=0.1).step(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_what_lies_around_a_tensor_is_neither_read_nor_written(
    backend: Backend, dtype: torch.dtype, name: str
) -> None:
    generator = torch.Generator().manual_seed(9)
    seas = []
    for numel in (*ISLANDS, *ISLANDS):
        sea = torch.full((numel + 32,), math.nan, dtype=dtype)
        sea[16:-16] = torch.randn(numel, generator=generator).to(dtype)
        seas.append(sea.to(backend.device))
    params = [Parameter(sea[16:-16]) for sea in seas[: len(ISLANDS)]]
    for param, sea in zip(params, seas[len(ISLANDS) :], strict=True):
        param.grad = sea[16:-16]
    result = CALLS[name](params)
    assert not isinstance(result, Tensor) or bool(result.isfinite())
    for sea in seas:
        assert bool(sea[16:-16].isfinite().all())
        assert bool(sea[:16].isnan().all()) and bool(sea[-16:].isnan().all())
