"""Which operations are measured on which shapes, and how many bytes each has to move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

import steadygrad as sg
from benchmarks import ours, peers
from benchmarks.batch_norm import cpu_cases, cuda_cases
from benchmarks.case import Build as BuildOn
from benchmarks.case import Case
from benchmarks.shapes import ModelShapes, gpt2_small, many_small, one_tensor, resnet50
from benchmarks.timer import Candidate
from benchmarks.workload import Workload

Build = Callable[[Workload], Candidate]

_L1, _L2 = 1e-6, 1e-4
_THRESHOLD = 1e-6

# Elements from which a step takes a GPU longer than the host takes to launch it.
_DEVICE_BOUND = 2**26


@dataclass(frozen=True)
class Operation:
    """One operation, ours and its peers.

    Attributes:
        key: short name, first half of the case keys.
        title: name for people.
        bytes_per_element: the floor: bytes our path has to move per fp32 element, with no help from
            caches.
        buffers: fp32 values per element that one call touches, of parameter, gradient and states.
        build: our candidate.
        peers: what it is compared with.
        params: whether the parameters are read.
        grads: whether the gradients are read.
        clip_active: whether gradients exceed the limit.
    """

    key: str
    title: str
    bytes_per_element: int
    buffers: int
    build: Build
    peers: tuple[Build, ...]
    params: bool = True
    grads: bool = True
    clip_active: bool = True

    def workload(self, model: ModelShapes, device: torch.device | None = None) -> Workload:
        """Fresh buffers of the given shapes for one candidate."""
        return Workload(
            model,
            params=self.params,
            grads=self.grads,
            clip_active=self.clip_active,
            device=device,
        )

    @property
    def builds(self) -> tuple[Build, ...]:
        """Ours first, then the peers."""
        return (self.build, *self.peers)


@dataclass(frozen=True)
class ModelCase:
    """One operation on one model's parameters; what its properties say is in `case.Case`.

    Attributes:
        operation: what is measured.
        model: the shapes it is measured on.
        quick: part of the quick table.
        host_cost: the data fits in cache and the time is that of the calls, so it is reported per
            tensor.
    """

    operation: Operation
    model: ModelShapes
    quick: bool = False
    host_cost: bool = False

    allocates = False
    averaged = False
    dtype = torch.float32

    @property
    def group(self) -> str:
        """Key of the operation."""
        return self.operation.key

    @property
    def key(self) -> str:
        """Name of the case, unique in the table: operation/shapes."""
        return f"{self.operation.key}/{self.model.key}"

    @property
    def title(self) -> str:
        """Name of the operation, for people."""
        return self.operation.title

    @property
    def floor(self) -> str:
        """Bytes per element, for people."""
        return f"moves {self.operation.bytes_per_element} B/element"

    @property
    def subject(self) -> str:
        """Name of the model, for people."""
        return self.model.title

    @property
    def tensors(self) -> int:
        """Number of parameter tensors."""
        return self.model.tensors

    @property
    def elements(self) -> int:
        """Number of elements in all parameter tensors together."""
        return self.model.elements

    @property
    def bytes_per_element(self) -> int:
        """The operation's floor."""
        return self.operation.bytes_per_element

    @property
    def floor_bytes(self) -> int:
        """The operation's bytes per element times the elements."""
        return self.operation.bytes_per_element * self.model.elements

    @property
    def working_set_bytes(self) -> int:
        """Bytes of parameters, gradients and states that one call of ours touches."""
        return 4 * self.operation.buffers * self.model.elements

    @property
    def clock(self) -> str:
        """The clock that counts on a GPU: "device" where memory is the bound, else "wall".

        Below, a step is over so soon that the host's work decides what a training loop sees.
        """
        return "device" if self.model.elements >= _DEVICE_BOUND else "wall"

    @property
    def builds(self) -> tuple[BuildOn, ...]:
        """Ours first, then the peers, each over buffers of its own."""
        return tuple(partial(self._build, build) for build in self.operation.builds)

    def _build(self, build: Build, device: torch.device) -> Candidate:
        return build(self.operation.workload(self.model, device))

    def memory_needed(self, buffer_sets: int = 1) -> int:
        """Every candidate's buffers, and two values an element for temporaries.

        Parameters and gradients that no candidate reads are reserved but never touched, hence free.
        """
        buffers = buffer_sets * self.working_set_bytes
        return len(self.operation.builds) * buffers + 8 * self.model.elements

    def cut(self) -> ModelCase:
        """The first tensors of the model, flattened and cut, under its own key."""
        return replace(self, model=self.model.cut())


def _stepping(
    key: str,
    title: str,
    bytes_per_element: int,
    states: int,
    make: peers.MakeOptimizer,
    *against: Build,
) -> Operation:
    return Operation(
        key, title, bytes_per_element, 2 + states, ours.stabilizer_step(make), tuple(against)
    )


def _operations() -> tuple[Operation, ...]:
    sgd = partial(torch.optim.SGD, lr=1e-4)
    momentum = partial(torch.optim.SGD, lr=1e-4, momentum=0.9)
    adam = partial(torch.optim.Adam, lr=1e-4)
    adamw = partial(torch.optim.AdamW, lr=1e-4)
    adagrad = partial(torch.optim.Adagrad, lr=1e-4)
    rmsprop = partial(torch.optim.RMSprop, lr=1e-4)

    def fused(make: peers.MakeOptimizer) -> Build:
        return peers.clip_then_step(make, peers.CLIP_FUSED, fused=True)

    def default(make: peers.MakeOptimizer) -> Build:
        return peers.clip_then_step(make, peers.CLIP_DEFAULT)

    def foreach(make: peers.MakeOptimizer) -> Build:
        return peers.clip_then_step(make, peers.CLIP_FOREACH, foreach=True)

    folded = peers.folded_step
    clip = partial(
        Operation,
        buffers=1,
        build=ours.clip_grad_norm,
        peers=(peers.torch_clip_grad_norm,),
        params=False,
    )
    return (
        clip("clip_active", "clip_grad_norm_, active", 12),
        clip("clip_inactive", "clip_grad_norm_, inactive", 4, clip_active=False),
        Operation(
            "total_norm", "get_total_norm", 4, 1, ours.get_total_norm,
            (peers.torch_get_total_norm,), params=False,
        ),
        Operation(
            "clip_value", "clip_grad_value_", 8, 1, ours.clip_grad_value,
            (peers.torch_clip_grad_value,), params=False,
        ),
        _stepping(
            "adamw", "clip + AdamW", 32, 2, adamw,
            fused(adamw), folded(adamw), default(adamw),
        ),
        Operation(
            "optim_adamw", "clip + optim.AdamW", 32, 4,
            ours.own_class_step(partial(sg.optim.AdamW, lr=1e-4)), (fused(adamw),),
        ),
        _stepping("adam", "clip + Adam", 32, 2, adam, fused(adam), folded(adam)),
        _stepping(
            "sgd_momentum", "clip + SGD momentum", 24, 1, momentum,
            fused(momentum), folded(momentum), default(momentum),
        ),
        _stepping("sgd", "clip + SGD", 16, 0, sgd, fused(sgd), folded(sgd)),
        _stepping(
            "adagrad", "clip + Adagrad", 24, 1, adagrad,
            fused(adagrad), folded(adagrad), default(adagrad),
        ),
        _stepping("rmsprop", "clip + RMSprop", 24, 1, rmsprop, default(rmsprop), foreach(rmsprop)),
        Operation(
            "add_penalty", "add_penalty_, L1 + L2", 12, 2, ours.add_penalty(_L1, _L2),
            (
                peers.autograd_penalty(_L1, _L2),
                peers.loop_penalty(_L1, _L2),
                peers.foreach_penalty(_L1, _L2),
            ),
        ),
        Operation(
            "soft_threshold", "soft_threshold_", 8, 1, ours.soft_threshold(_THRESHOLD),
            (peers.composite_threshold(_THRESHOLD), peers.softshrink_threshold(_THRESHOLD)),
            grads=False,
        ),
    )  # fmt: skip


OPERATIONS: dict[str, Operation] = {operation.key: operation for operation in _operations()}


_QUICK = {"clip_active", "clip_inactive", "adamw", "sgd_momentum", "add_penalty"}


def _cases(large: dict[str, tuple[ModelShapes, ...]]) -> tuple[ModelCase, ...]:
    """The plan of one device; `large` says what operations run on beyond ResNet-50 and small."""
    resnet, small = resnet50(), many_small()
    alone = {"clip_value", "adam", "sgd", "adagrad", "rmsprop"}
    return tuple(
        ModelCase(
            operation,
            model,
            quick=key in _QUICK and model in (resnet, small),
            host_cost=model is small,
        )
        for key, operation in OPERATIONS.items()
        for model in (resnet, *large.get(key, ()), *(() if key in alone else (small,)))
    )


def _cpu_cases() -> tuple[ModelCase, ...]:
    gpt2, one, huge = gpt2_small(), one_tensor(26), one_tensor(28)
    return _cases(
        {
            "clip_active": (gpt2, one, huge),
            "clip_inactive": (gpt2, one, huge),
            "total_norm": (one,),
            "adamw": (gpt2, one),
            "sgd_momentum": (gpt2,),
        }
    )


def _cuda_cases() -> tuple[ModelCase, ...]:
    gpt2, huge = gpt2_small(), one_tensor(28)
    norms = dict.fromkeys(("clip_active", "clip_inactive", "adamw"), (gpt2, huge))
    return _cases({**norms, "total_norm": (huge,), "sgd_momentum": (gpt2,)})


CASES: tuple[Case, ...] = (*_cpu_cases(), *cpu_cases())
CUDA_CASES: tuple[Case, ...] = (*_cuda_cases(), *cuda_cases())


def cases_of(*groups: str) -> list[Case]:
    """The cases on the CPU of the operations with the given keys, in table order."""
    return [case for case in CASES if case.group in groups]
