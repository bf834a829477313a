"""Runs every operation on small tensors and compares it with its definition in NumPy on the same numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch

# Largest |got - want| / max |want|. Norms are fp32 for half types too; elements are rounded at most twice to the dtype
# of the gradient or parameter.
TOLERANCES = {
    "norm": {"float32": 1.2e-7, "float64": 1e-15, "bfloat16": 1.2e-7, "float16": 1.2e-7},
    "elements": {"float32": 5e-7, "float64": 1e-14, "bfloat16": 8e-3, "float16": 1e-3},
}

# Sizes that no vector width divides, one just above half a chunk, and a 4-d tensor.
SHAPES = ((33, 7), (4099,), (8, 3, 3, 3))
LIMIT, CLIP_VALUE, L1, L2, AMOUNT = 40.0, 0.5, 0.1, 0.2, 0.3
MOMENTUM, EPS = 0.1, 1e-5

Arrays = Sequence[Any]


@dataclass(frozen=True)
class Check:
    """Holds the outcome of one operation in one dtype; ``message`` is the error if it raised one."""

    operation: str
    dtype: str
    error: float
    tolerance: float
    seconds: float
    message: str = ""

    @property
    def passed(self) -> bool:
        """Returns whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class _Operation:
    """Describes an operation: ``run`` calls the package, ``define`` the reference, and the results are compared.

    Besides what ``run`` returns, the tensors that ``writes`` names are compared: "gradients" or "parameters".
    ``writes`` is "outputs" if all results are returned, and empty if only a norm is.
    """

    name: str
    writes: str
    run: Callable[[Any, list[torch.nn.Parameter]], torch.Tensor | Sequence[torch.Tensor] | None]
    define: Callable[[Any, Arrays, Arrays], Arrays]


def check_kernels(
    package: ModuleType, device: str = "cpu", dtypes: Sequence[str] = tuple(TOLERANCES["norm"])
) -> list[Check]:
    """Runs every operation in every dtype on small random tensors and compares it with its definition."""
    reference = import_module("steadygrad.reference")
    return [
        _check(operation, dtype, package, reference, device)
        for operation in _operations()
        for dtype in dtypes
    ]


def _check(operation: _Operation, dtype: str, package: Any, reference: Any, device: str) -> Check:
    tolerance = TOLERANCES["elements" if operation.writes else "norm"][dtype]
    numbers = _random_parameters(dtype, "cpu")
    want = operation.define(reference, _arrays(numbers), _arrays(_grads(numbers)))
    start = time.perf_counter()
    try:
        operation.run(package, _random_parameters(dtype, device))  # loads code, so it is not timed
        params = _random_parameters(dtype, device)
        start = time.perf_counter()
        returned = operation.run(package, params)
        if returned is None or isinstance(returned, torch.Tensor):
            returned = [] if returned is None else [returned]
        # Reading waits for the device, so that its errors are raised here and its time is counted.
        got = _arrays([*returned, *_written(operation, params)])
    except Exception as error:  # the doctor reports whatever a broken kernel raises
        message = f"{type(error).__name__}: {error}"
        return Check(
            operation.name, dtype, math.nan, tolerance, time.perf_counter() - start, message
        )
    seconds = time.perf_counter() - start
    errors = [np.max(np.abs(g - w)) / np.max(np.abs(w)) for g, w in zip(got, want, strict=True)]
    return Check(operation.name, dtype, float(np.max(errors)), tolerance, seconds)


def _written(operation: _Operation, params: list[torch.nn.Parameter]) -> Sequence[torch.Tensor]:
    written: dict[str, Sequence[torch.Tensor]] = {"gradients": _grads(params), "parameters": params}
    return written.get(operation.writes, [])


def _operations() -> list[_Operation]:
    return [
        *(_norm(norm_type) for norm_type in (2.0, 1.0, math.inf, 3.0)),
        _Operation(
            "clip_grad_norm_",
            "gradients",
            lambda sg, params: sg.clip_grad_norm_(params, LIMIT),
            lambda ref, params, grads: [ref.norm.total_norm(grads), *_clipped(ref, grads)],
        ),
        _Operation(
            "clip_grads_with_norm_",
            "gradients",
            lambda sg, params: sg.clip_grads_with_norm_(
                params, LIMIT, sg.get_total_norm(_grads(params))
            ),
            lambda ref, params, grads: _clipped(ref, grads),
        ),
        _Operation(
            "clip_grad_value_",
            "gradients",
            lambda sg, params: sg.clip_grad_value_(params, CLIP_VALUE),
            lambda ref, params, grads: ref.clip.clip_grad_value(grads, CLIP_VALUE),
        ),
        _Operation(
            "add_penalty_",
            "gradients",
            lambda sg, params: sg.add_penalty_(params, L1, L2),
            _penalized,
        ),
        _Operation(
            "soft_threshold_",
            "parameters",
            lambda sg, params: sg.soft_threshold_(params, AMOUNT),
            lambda ref, params, grads: [ref.penalty.soft_threshold(p, AMOUNT) for p in params],
        ),
        _steps("SGD", lr=0.05, momentum=0.9, nesterov=True),
        # eps is well above the roots of squares that a float16 state cannot hold.
        _steps("Adam", lr=0.05, eps=0.1, amsgrad=True),
        _steps("AdamW", lr=0.05, eps=0.1, weight_decay=0.1),
        _steps("Adagrad", lr=0.05, lr_decay=0.1),
        _steps("RMSprop", lr=0.05, momentum=0.9),
        _steps("Adamax", lr=0.05, eps=0.1),
        # NAdam and ASGD keep some numbers in fp32, as torch does; with these options the numbers are exact in fp32.
        _steps("NAdam", lr=0.05, betas=(0.5, 0.999), eps=0.1, momentum_decay=0.0),
        _steps("RAdam", lr=0.05, weight_decay=0.1),
        _steps("Adadelta", lr=0.5, eps=0.1),
        _steps("ASGD", lr=0.0625, lambd=0.1, alpha=0.0, t0=0.0),
        # Rprop steps by the sign of a gradient, which is 0 where a sum rounds to 0. The steps are too short to show it.
        _steps("Rprop", lr=1e-3),
        _steps("Lion", lr=0.05, weight_decay=0.1),
        _batch_norm("batch_norm", training=True),
        _batch_norm("batch_norm, add, relu", training=True, activation="relu"),
        _batch_norm("batch_norm, inference", training=False),
    ]


def _norm(norm_type: float) -> _Operation:
    return _Operation(
        f"get_total_norm, {norm_type:g}",
        "",
        lambda sg, params: sg.get_total_norm(_grads(params), norm_type),
        lambda ref, params, grads: [ref.norm.total_norm(grads, norm_type)],
    )


def _clipped(reference: Any, grads: Arrays) -> Arrays:
    return list(reference.clip.clip_grad_norm(grads, LIMIT)[0])


def _penalized(reference: Any, params: Arrays, grads: Arrays) -> Arrays:
    penalty = reference.penalty
    added = [penalty.penalty_gradient(param, L1, L2) for param in params]
    value = penalty.penalty_value(params, L1, L2)
    return [value, *(grad + extra for grad, extra in zip(grads, added, strict=True))]


def _steps(rule: str, **hyper: Any) -> _Operation:
    """Describes two fused steps with penalty and clip, the second on the state that the first left."""

    def run(sg: Any, params: list[torch.nn.Parameter]) -> None:
        optimizer = getattr(sg.optim, rule)(params, max_norm=LIMIT, l1=L1, l2=L2, **hyper)
        optimizer.step()
        optimizer.step()
        if optimizer.path != "fused":
            raise RuntimeError(f"expected the fused path, got {optimizer.path!r}")

    def define(reference: Any, params: Arrays, grads: Arrays) -> Arrays:
        step = reference.step
        group = step.Group(range(len(params)), hyper, max_norm=LIMIT, l1=L1, l2=L2)
        states: list[dict[str, Any]] = [{} for _ in params]
        for _ in range(2):
            result = step.step(params, grads, states, [group], step.StepOptions(rule))
            params, states = result.params, result.states
        return params

    return _Operation(f"{rule}, 2 fused steps", "parameters", run, define)


def _batch_norm(name: str, training: bool, activation: str | None = None) -> _Operation:
    """Describes a batch norm by its output, running statistics and gradients.

    The image is normalised, the image's gradient is the gradient of the output, and rows of the matrix are weight,
    bias, mean and variance. With an activation the layout is channels last, and the gradient is also the residual.
    """

    def run(sg: Any, params: list[torch.nn.Parameter]) -> Sequence[torch.Tensor]:
        matrix, image, grad_output = params[0].detach(), params[2].detach(), _grads(params)[2]
        weight, bias, mean, var = (matrix[row, : image.shape[1]].clone() for row in range(4))
        var.abs_()
        leaves = [image.clone(), weight, bias]
        residual = None
        if activation is not None:
            leaves[0] = image.contiguous(memory_format=torch.channels_last)
            residual = grad_output.clone()
            leaves.append(residual)
        for leaf in leaves:
            leaf.requires_grad_()
        output = sg.nn.functional.batch_norm(
            *(leaves[0], mean, var, weight, bias, training, MOMENTUM, EPS),
            residual=residual,
            activation=activation,
        )
        if "Native" in output.grad_fn.name():
            raise RuntimeError("expected the package's kernels, got torch's")
        return [output, mean, var, *torch.autograd.grad(output, leaves, grad_output)]

    def define(reference: Any, params: Arrays, grads: Arrays) -> Arrays:
        norm, image, grad_output = reference.batch_norm, params[2], grads[2]
        weight, bias, mean, var = (params[0][row, : image.shape[1]] for row in range(4))
        statistics = norm.Statistics(mean, np.abs(var), 0)
        running = mean, np.abs(var)
        if training:
            statistics = norm.channel_statistics(image)
            running = norm.update_running_statistics(*running, statistics, MOMENTUM)
        residual = None if activation is None else grad_output
        arguments = image, statistics, weight, bias, EPS, residual, activation
        gradients = norm.batch_norm_backward(grad_output, *arguments, not training)
        of_leaves = [gradients.input, gradients.weight, gradients.bias]
        of_leaves += [] if activation is None else [gradients.residual]
        return [norm.batch_norm(*arguments), *running, *of_leaves]

    return _Operation(name, "outputs", run, define)


def _random_parameters(dtype: str, device: str) -> list[torch.nn.Parameter]:
    generator = np.random.default_rng(0)
    params = []
    for shape in SHAPES:
        value, grad = torch.from_numpy(generator.standard_normal((2, *shape)))
        params.append(torch.nn.Parameter(value.to(device, getattr(torch, dtype))))
        params[-1].grad = grad.to(device, params[-1].dtype)
    return params


def _grads(params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [param.grad for param in params if param.grad is not None]


def _arrays(tensors: Sequence[torch.Tensor]) -> Arrays:
    return [tensor.detach().cpu().double().numpy().copy() for tensor in tensors]
