"""Declare which operations are measured on which shapes, and how many bytes they have to move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.nn import utils

import steadygrad as sg
from benchmarks import candidates as sides
from benchmarks import shapes
from benchmarks.batch_norm import cpu_cases, cuda_cases
from benchmarks.candidates import Build, MakeOptimizer, Workload
from benchmarks.case import DTYPES, Case
from benchmarks.shapes import ModelShapes
from benchmarks.timer import Candidate
from steadygrad.optim import lion

# From this number of elements on, a step takes the GPU longer than the host takes to launch it.
_DEVICE_BOUND = 2**26


Peer = Callable[[MakeOptimizer], Build]  # makes a peer's builder from a MakeOptimizer


@dataclass(frozen=True)
class Operation:
    """Describes one operation on parameters, ours and its peers.

    Attributes:
        values: Number of values of the parameters' dtype that our path has to move per element; the
            floor follows from it.
        buffers: Number of values per element that one call touches: parameter, gradient and states.
        builds: Builders of the candidates, ours first.
        draws: What `Workload` draws, where it is not all that it can draw, as its keyword arguments.
    """

    key: str
    title: str
    values: int
    buffers: int
    builds: tuple[Build, ...]
    draws: Mapping[str, Any] = field(default_factory=dict)

    def workload(
        self, model: ModelShapes, dtype: torch.dtype, device: torch.device | None = None
    ) -> Workload:
        """Draw fresh buffers of the given shapes for one candidate."""
        return Workload(model, dtype=dtype, device=device, **self.draws)


def model_case(
    operation: Operation,
    model: ModelShapes,
    dtype: torch.dtype = torch.float32,
    *,
    quick: bool = False,
    host_cost: bool = False,
) -> Case:
    """Return the case of one operation on one model's parameters.

    Two values per element are kept free for temporaries. Parameters and gradients that no candidate
    reads are reserved but never touched, so they take no memory. On a GPU the host's clock counts
    for small models, whose time depends on the host's work.
    """

    def on(build: Build, device: torch.device) -> Candidate:
        return build(operation.workload(model, dtype, device))

    half = "" if dtype == torch.float32 else DTYPES[dtype]
    moved = operation.values * dtype.itemsize
    touched = operation.buffers * dtype.itemsize * model.elements
    return Case(
        group=operation.key,
        key=f"{operation.key}/{model.key}{half and '_' + half}",
        title=operation.title,
        subject=f"{model.title}{half and ' ' + half}",
        dtype=dtype,
        tensors=model.tensors,
        elements=model.elements,
        bytes_per_element=moved,
        working_set_bytes=touched,
        set_bytes=len(operation.builds) * touched,
        spare_bytes=8 * model.elements,
        builds=tuple(partial(on, build) for build in operation.builds),
        cut=lambda: model_case(operation, model.cut(), dtype, host_cost=host_cost),
        quick=quick,
        host_cost=host_cost,
        clock="device" if model.elements >= _DEVICE_BOUND else "wall",
    )


# Optimizers without a fused version in torch, or not in torch at all, and their number of state
# tensors.
_WITHOUT_FUSED_PEER: dict[str, tuple[int, MakeOptimizer]] = {
    "adamax": (2, torch.optim.Adamax),
    "nadam": (2, torch.optim.NAdam),
    "radam": (2, torch.optim.RAdam),
    "adadelta": (2, torch.optim.Adadelta),
    "asgd": (1, torch.optim.ASGD),
    "rprop": (2, torch.optim.Rprop),
    "lion": (1, lion.Lion),
}


def _operations() -> Iterator[Operation]:
    fused = partial(sides.clip_then_step, name=sides.CLIP_FUSED, fused=True)
    default = partial(sides.clip_then_step, name=sides.CLIP_DEFAULT)
    foreach = partial(sides.clip_then_step, name=sides.CLIP_FOREACH, foreach=True)
    folded = sides.folded_step
    clip = sides.both(
        sg.clip_grad_norm_, utils.clip_grad_norm_, lambda load: (load.params, load.limit)
    )
    norm = sides.both(sg.get_total_norm, utils.get_total_norm, lambda load: (load.grads,))
    value = sides.both(
        sg.clip_grad_value_, utils.clip_grad_value_, lambda load: (load.params, load.fraction)
    )
    gradients = {"params": False}
    inactive = {**gradients, "clip_active": False}
    yield Operation("clip_active", "clip_grad_norm_, active", 3, 1, clip, gradients)
    yield Operation("clip_inactive", "clip_grad_norm_, inactive", 1, 1, clip, inactive)
    yield Operation("total_norm", "get_total_norm", 1, 1, norm, gradients)
    yield Operation("clip_value", "clip_grad_value_", 2, 1, value, gradients)

    def stepping(key: str, title: str, states: int, make: MakeOptimizer, *peers: Peer) -> Operation:
        builds = (sides.stabilizer_step(make), *(peer(make) for peer in peers))
        return Operation(key, f"clip + {title}", 4 + 2 * states, 2 + states, builds)

    adamw = partial(torch.optim.AdamW, lr=1e-4)
    yield stepping("adamw", "AdamW", 2, adamw, fused, folded, default)
    few_rows = stepping("adamw_zeros", "AdamW, 1 row in 64", 2, adamw, fused)
    yield replace(few_rows, draws={"rows_reached": 1 / 64})
    # The same step without telemetry runs twice; the difference of the two is noise.
    telemetry: dict[str, Any] = {
        sides.OURS: "tensor",
        f"{sides.OURS}, telemetry global": "global",
        f"{sides.OURS}, no telemetry": None,
        f"{sides.OURS}, no telemetry, again": None,
    }
    own = [
        sides.own_class_step(partial(sg.optim.AdamW, lr=1e-4, telemetry=level), name)
        for name, level in telemetry.items()
    ]
    yield Operation("optim_adamw", "clip + optim.AdamW", 8, 4, (*own, fused(adamw)))
    adam = partial(torch.optim.Adam, lr=1e-4)
    yield stepping("adam", "Adam", 2, adam, fused, folded)
    momentum = partial(torch.optim.SGD, lr=1e-4, momentum=0.9)
    yield stepping("sgd_momentum", "SGD momentum", 1, momentum, fused, folded, default)
    sgd = partial(torch.optim.SGD, lr=1e-4)
    yield stepping("sgd", "SGD", 0, sgd, fused, folded)
    adagrad = partial(torch.optim.Adagrad, lr=1e-4)
    yield stepping("adagrad", "Adagrad", 1, adagrad, fused, folded, default)
    rmsprop = partial(torch.optim.RMSprop, lr=1e-4)
    yield stepping("rmsprop", "RMSprop", 1, rmsprop, default, foreach)
    for key, (states, optimizer) in _WITHOUT_FUSED_PEER.items():
        make = partial(optimizer, lr=1e-4)
        yield stepping(key, optimizer.__name__, states, make, default)
    penalties = sides.penalties(1e-6, 1e-4)
    yield Operation("add_penalty", "add_penalty_, L1 + L2", 3, 2, penalties)
    thresholds = sides.thresholds(1e-6)
    yield Operation("soft_threshold", "soft_threshold_", 2, 1, thresholds, {"grads": False})


OPERATIONS: dict[str, Operation] = {operation.key: operation for operation in _operations()}

_QUICK = {"clip_active", "clip_inactive", "adamw", "sgd_momentum", "add_penalty"}
_RESNET, _GPT2, _SMALL = shapes.resnet50(), shapes.gpt2_small(), shapes.many_small()
_FEW = (shapes.POLICY, shapes.DIGITS, shapes.lora(96))
_LORA = shapes.lora(448, 4096)
_ONE, _HUGE = shapes.one_tensor(26), shapes.one_tensor(28)
# The models of operations that are measured on others than ResNet-50 and many small tensors.
_MODELS: dict[str, tuple[ModelShapes, ...]] = {
    "adamw_zeros": (shapes.EMBEDDING,),
    "sgd_momentum": (_RESNET, _GPT2, _SMALL),
    **dict.fromkeys(("adam", "sgd", "adagrad", "rmsprop", "clip_value"), (_RESNET,)),
    **dict.fromkeys(_WITHOUT_FUSED_PEER, (_RESNET,)),
}
# Number of batch norm cases that a GPU measures before the less important operations.
_FIRST = 36


def _on(key: str, *models: ModelShapes, dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    for model in models:
        quick = key in _QUICK and model in (_RESNET, _SMALL) and dtype == torch.float32
        host_cost = model in (_SMALL, *_FEW)
        yield model_case(OPERATIONS[key], model, dtype, quick=quick, host_cost=host_cost)


def _cpu_cases() -> Iterator[Case]:
    models = {
        **_MODELS,
        "clip_active": (_RESNET, _GPT2, _ONE, _HUGE, _SMALL, *_FEW, _LORA),
        "clip_inactive": (_RESNET, _GPT2, _ONE, _HUGE, _SMALL),
        "total_norm": (_RESNET, _ONE, _SMALL),
        "adamw": (_RESNET, _GPT2, _ONE, _SMALL, *_FEW, _LORA),
    }
    for key in OPERATIONS:
        yield from _on(key, *models.get(key, (_RESNET, _SMALL)))
    yield from cpu_cases()


def _cuda_cases() -> Iterator[Case]:
    """Yield the cases for a GPU, the most important first, since a time limit may end the run."""
    for dtype in DTYPES:
        yield from _on("adamw", _GPT2, _RESNET, _HUGE, dtype=dtype)
    for key in ("clip_inactive", "clip_active"):
        yield from _on(key, _HUGE, _GPT2, _RESNET, _SMALL)
    yield from _on("adamw", _SMALL, *_FEW, _LORA)
    batch_norms = list(cuda_cases())
    yield from batch_norms[:_FIRST]
    models = {**_MODELS, "total_norm": (_RESNET, _HUGE, _SMALL)}
    first = ("adamw_zeros", "sgd_momentum", "total_norm", "optim_adamw", "add_penalty")
    for key in dict.fromkeys((*first, "soft_threshold", *_MODELS)):
        yield from _on(key, *models.get(key, (_RESNET, _SMALL)))
    yield from _on("clip_active", *_FEW, _LORA)
    yield from batch_norms[_FIRST:]


CASES: tuple[Case, ...] = tuple(_cpu_cases())
CUDA_CASES: tuple[Case, ...] = tuple(_cuda_cases())
