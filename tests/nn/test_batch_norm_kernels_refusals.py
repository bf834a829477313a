"""Batch norm kernels refuse what they cannot do, before they write anything."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steadygrad import _kernels
from tests.backends import Backend
from tests.nn.batch_norm_calls import Case
from tests.tolerances import float64

Arguments = dict[str, Any]
CHANNELS = 5
SHAPE = (4, CHANNELS, 6, 3)
# The arguments in the order of each kernel; "=" marks those that it writes.
AFFINE = ["weight", "bias"]
RUNNING = ["running_mean", "running_var"]
SAVED = ["grad_output", "input", "mask", *AFFINE, "statistics"]
KERNELS: dict[str, list[str]] = {
    "batch_norm_statistics": ["input", "statistics", "allocate"],
    "batch_norm_forward": [
        *("input", "residual", *AFFINE, *RUNNING, "num_batches_tracked", "momentum", "eps"),
        *("ceiling", "output", "mask", "statistics", "allocate"),
    ],
    "batch_norm_normalize": [
        *("input", "residual", *AFFINE, "statistics", *RUNNING, "eps", "ceiling", "output", "mask"),
    ],
    "batch_norm_combine": [
        *("parts", "statistics", *RUNNING, "num_batches_tracked", "momentum"),
    ],
    "batch_norm_backward": [
        *(*SAVED, *RUNNING, "eps", "ceiling"),
        *("grad_input", "grad_residual", "grad_weight", "grad_bias", "allocate"),
    ],
    "batch_norm_backward_sums": [*SAVED, "eps", "ceiling", "sums", "allocate"],
    "batch_norm_backward_input": [*SAVED, "sums", "eps", "ceiling", "grad_input", "grad_residual"],
}
FULL = ["input", "residual", "output", "grad_output", "grad_input", "grad_residual"]
VECTORS = [*AFFINE, *RUNNING, "grad_weight", "grad_bias"]

Change = Callable[[Tensor], Any]


def to_numpy(tensor: Tensor) -> Any:
    return float64(tensor)


# By what is wrong with an argument: how to make it so.
WRONG_TENSOR: dict[str, Change] = {
    "integers": lambda t: t.to(torch.int32),
    "complex": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "numpy": to_numpy,
    "sparse": lambda t: t.to_sparse(),
}
WRONG_FULL: dict[str, Change] = {
    "another dtype": lambda t: t.double(),
    "half": lambda t: t.half(),
    "fewer samples": lambda t: t[:3].contiguous(),
    "fewer channels": lambda t: t[:, :4].contiguous(),
    "flattened": lambda t: t.flatten(2),
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "every second": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
    "expanded": lambda t: t[:1].expand(SHAPE),
}
WRONG_VECTOR: dict[str, Change] = {
    "too short": lambda t: t[:-1].clone(),
    "too long": lambda t: torch.cat([t, t[:1]]),
    "every second": lambda t: t.repeat_interleave(2)[::2],
}
WRONG_FLOAT64: dict[str, Change] = {"float32": lambda t: t.float()} | WRONG_VECTOR
WRONG_MASK: dict[str, Change] = {"bool": lambda t: t.bool(), "int8": lambda t: t.view(torch.int8)}
WRONG_COUNTER: dict[str, Change] = {
    "int32": lambda t: t.int(),
    "float": lambda t: t.double(),
    "two elements": lambda t: torch.stack([t, t]),
    "meta": lambda t: t.to("meta"),
}
WRONG_PARTS: dict[str, Change] = {
    "float32": lambda t: t.float(),
    "one dimension": lambda t: t[0].clone(),
    "a column less": lambda t: t[:, :-1].contiguous(),
    "transposed": lambda t: t.t().contiguous().t(),
    "meta": lambda t: t.to("meta"),
}
WRONG_INPUT = {
    "one dimension": lambda t: t.flatten(),
    "every second": WRONG_FULL["every second"],
    "expanded": WRONG_FULL["expanded"],
    "transposed": lambda t: t.transpose(2, 3),
}


def changes(argument: str) -> dict[str, Change]:
    """Return everything that can be wrong with an argument."""
    if argument == "input":
        return WRONG_INPUT | WRONG_TENSOR
    if argument in FULL:
        return WRONG_FULL | WRONG_TENSOR
    if argument in VECTORS:
        return {"two dimensions": lambda t: t[None].clone()} | WRONG_VECTOR | WRONG_TENSOR
    if argument in ("statistics", "sums"):
        return WRONG_FLOAT64 | WRONG_TENSOR
    if argument == "mask":
        return WRONG_MASK | WRONG_VECTOR | WRONG_TENSOR
    others = {"num_batches_tracked": WRONG_COUNTER, "parts": WRONG_PARTS}
    return others.get(argument, {})


REFUSALS = [
    pytest.param(
        kernel, argument, what, id=f"{kernel.removeprefix('batch_norm_')}-{argument}-{what}"
    )
    for kernel, arguments in KERNELS.items()
    for argument in arguments
    for what in changes(argument)
]


def valid_arguments(kernel: str, backend: Backend, dtype: torch.dtype = torch.float32) -> Arguments:
    """Return arguments that the kernel takes."""
    case = Case(SHAPE, backend.device, dtype, fusion="add+relu")
    _, mask, statistics = case.forward()
    mean, var, _ = case.running()
    grads = case.gradients()
    values: Arguments = {
        "statistics": statistics,
        "running_mean": mean,
        "running_var": var,
        "num_batches_tracked": torch.tensor(3, device=case.device),
        "momentum": 0.1,
        "eps": 1e-5,
        "ceiling": math.inf,
        "output": case.empty(),
        "mask": mask,
        "parts": torch.stack([statistics, statistics]),
        "sums": case.backward_sums(mask, statistics),
        "allocate": case.allocate,
        **case.tensors,
        **{f"grad_{name}": grad for name, grad in grads.items()},
    }
    chosen = {name: values[name] for name in KERNELS[kernel]}
    if kernel in ("batch_norm_normalize", "batch_norm_backward"):
        # The kernel takes one kind of statistics, here the batch's.
        chosen |= {"running_mean": None, "running_var": None}
    return chosen


def call(kernel: str, arguments: Arguments) -> None:
    getattr(_kernels, kernel)(*(arguments[name] for name in KERNELS[kernel]))


def storages(arguments: Arguments) -> dict[str, bytes]:
    """Return the bytes in memory of all tensors that have some."""
    found = {}
    for name, value in arguments.items():
        if (
            isinstance(value, Tensor)
            and value.layout == torch.strided
            and value.device.type != "meta"
        ):
            storage = value.untyped_storage()
            flat = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
            found[name] = flat.cpu().numpy().tobytes()
    return found


@pytest.mark.parametrize("kernel", KERNELS)
def test_valid_arguments_are_taken(backend: Backend, kernel: str) -> None:
    arguments = valid_arguments(kernel, backend)
    before = storages(arguments)
    call(kernel, arguments)
    written = {name for name, storage in storages(arguments).items() if storage != before[name]}
    may_write = {*KERNELS[kernel]} - {*SAVED, "residual", "parts"} | {"statistics", "mask"}
    assert written <= may_write
    wanted = {"output", "grad_input", "grad_residual", "grad_weight", "grad_bias"}
    assert written >= wanted & set(KERNELS[kernel])


@pytest.mark.once
@pytest.mark.parametrize(("kernel", "argument", "what"), REFUSALS)
def test_refusal_names_function_and_argument(
    backend: Backend, kernel: str, argument: str, what: str
) -> None:
    arguments = valid_arguments(kernel, backend)
    if argument in RUNNING and arguments[argument] is None:
        arguments |= {"statistics": None}
        arguments |= {name: torch.ones(CHANNELS, device=backend.device) for name in RUNNING}
        call(kernel, arguments)  # the other arguments are right
    arguments[argument] = changes(argument)[what](arguments[argument])
    before = storages(arguments)
    with pytest.raises(
        (TypeError, ValueError), match=rf"^batch_norm\w*: {argument}: expected .*, got "
    ):
        call(kernel, arguments)
    assert storages(arguments) == before


@pytest.mark.parametrize("kernel", KERNELS)
def test_tensors_that_must_be_there(backend: Backend, kernel: str) -> None:
    optional = {"residual", "mask", "num_batches_tracked", *VECTORS, "grad_input", "grad_residual"}
    for argument, value in valid_arguments(kernel, backend).items():
        if not isinstance(value, Tensor) or argument in optional:
            continue
        for wrong in (None, 3.0, [value]):
            if argument == "statistics" and wrong is None and "running_mean" in KERNELS[kernel]:
                continue
            arguments = valid_arguments(kernel, backend) | {argument: wrong}
            before = storages(arguments)
            says = rf"^batch_norm\w*: {argument}: expected .*, got "
            with pytest.raises((TypeError, ValueError), match=says):
                call(kernel, arguments)
            assert storages(arguments) == before


@pytest.mark.parametrize("kernel", ["batch_norm_normalize", "batch_norm_backward"])
@pytest.mark.parametrize("given", ["neither", "running_mean", "running_var"])
def test_some_statistics_must_be_there(backend: Backend, kernel: str, given: str) -> None:
    arguments = valid_arguments(kernel, backend) | {"statistics": None}
    if given != "neither":
        arguments[given] = torch.ones(CHANNELS, device=backend.device)
    before = storages(arguments)
    with pytest.raises((TypeError, ValueError), match=r"^batch_norm\w*: .*(statistics|running_)"):
        call(kernel, arguments)
    assert storages(arguments) == before


@pytest.mark.parametrize("argument", ["eps", "momentum"])
@pytest.mark.parametrize("wrong", ["0.1", [0.1]])
def test_numbers_must_be_numbers(backend: Backend, argument: str, wrong: Any) -> None:
    arguments = valid_arguments("batch_norm_forward", backend) | {argument: wrong}
    before = storages(arguments)
    says = {
        "eps": "batch_norm_forward",
        "momentum": "^batch_norm: momentum: expected a number or None",
    }
    with pytest.raises((TypeError, ValueError), match=says[argument]):
        call("batch_norm_forward", arguments)
    assert storages(arguments) == before


def test_layouts(backend: Backend) -> None:
    def layout(tensor: Tensor) -> int:
        return _kernels.batch_norm_layout(tensor.to(backend.device))

    for shape in [(2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6), (1, 3, 2), (2, 3, 1, 7)]:
        first = torch.zeros(shape)
        last = torch.zeros(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        assert (layout(first), layout(last)) == (1, 2)
        assert layout(first.repeat_interleave(2, dim=-1)[..., ::2]) == 0
        assert layout(torch.zeros(shape[0], 2 * shape[1], *shape[2:])[:, ::2]) == 0
    assert layout(torch.zeros(4, 3)) != 0
    assert layout(torch.zeros(3, 4).t()) == 0
    # Strides of dimensions of size 1 do not matter.
    assert layout(torch.zeros(4, 3, 1, 1).to(memory_format=torch.channels_last)) != 0
    assert layout(torch.zeros(2, 3, 4)[:1]) == 1
    assert layout(torch.empty_strided((1, 3, 4), (99, 4, 1))) == 1
    assert layout(torch.empty_strided((2, 1, 4), (4, 77, 1))) != 0
    assert layout(torch.zeros(4, 3, 5).transpose(0, 2)) == 0
    assert layout(torch.zeros(2, 3, 4, 5).transpose(2, 3)) == 0


def test_counts_that_do_not_fit_are_refused(backend: Backend) -> None:
    """Refuse a mask of another layout, which has another size."""
    for shape in [(3, 5, 7), (2, 9, 4)]:
        case = Case(shape, backend.device, fusion="add+relu")
        right = case.mask()
        assert right is not None
        case.layout = "last"
        case.put("input", case.array("input"))
        wrong = case.mask()
        assert wrong is not None and wrong.numel() != right.numel()
        case.put("residual", case.array("residual"))
        output, statistics = case.empty(), case.vector(2 * case.channels + 1)
        arguments = [case["input"], case["residual"], *case.affine, None, None, None, 0.1, 1e-5]
        with pytest.raises(
            (TypeError, ValueError), match=r"^batch_norm\w*: mask: expected .*, got "
        ):
            _kernels.batch_norm_forward(*arguments, True, output, right, statistics, None)
        assert np.all(float64(output) == 77.0)


@pytest.mark.once
@pytest.mark.parametrize(
    ("ceiling", "error"),
    [(0.0, ValueError), (-6.0, ValueError), (math.nan, ValueError), ("6", TypeError)],
)
def test_ceilings(backend: Backend, ceiling: Any, error: type[Exception]) -> None:
    for kernel, names in KERNELS.items():
        if "ceiling" in names:
            arguments = valid_arguments(kernel, backend) | {"ceiling": ceiling}
            with pytest.raises(
                error, match=r"batch_norm: ceiling: expected a .*number or None, got"
            ):
                call(kernel, arguments)
