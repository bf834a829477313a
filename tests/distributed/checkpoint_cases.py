"""Optimizers to take checkpoints of, whose steps have the same bits however their parameters are shared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

import steadygrad as sg
from steadygrad.optim.stabilized import StabilizedOptimizer
from tests.distributed.sharded_cases import Network, groups_of

Found = dict[str, Any]

BEFORE, AFTER = 5, 4  # steps before and after the checkpoint
_SKIPPED = 2  # the step with a NaN


@dataclass(frozen=True)
class Case:
    """An optimizer, and how it stores parameters and state."""

    rule: str
    kind: str  # "wrapper", "class" or torch's own
    dtype: torch.dtype = torch.float32
    rounding: str = "nearest"
    state_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        words = [self.rule, self.kind, str(self.dtype).removeprefix("torch."), self.rounding]
        return "-".join(words + (["float32_state"] if self.state_dtype else []))

    def optimizer(self, network: nn.Module, **torch_options: Any) -> torch.optim.Optimizer:
        """Return the optimizer, with its parameters in two param groups."""
        groups = groups_of(network)
        groups[1]["lr"] = 0.05
        adamw = {"lr": 0.1, "weight_decay": 0.05}
        options = {**(adamw if self.rule == "AdamW" else {"lr": 0.1, "momentum": 0.9})}
        options |= torch_options
        ours: dict[str, Any] = {"max_norm": 1.5, "clip_scope": "group", "rounding_seed": 7}
        ours |= {"rounding": self.rounding, "state_dtype": self.state_dtype}
        torchs = getattr(torch.optim, self.rule)
        if self.kind == "torch":
            return torchs(groups, **options)
        if self.kind == "wrapper":
            return sg.Stabilizer(torchs(groups, **options), **ours)
        return getattr(sg.optim, self.rule)(groups, **options, **ours)


_HALF = torch.bfloat16
CASES = [
    Case("AdamW", "wrapper"),
    Case("AdamW", "wrapper", _HALF),
    Case("AdamW", "wrapper", _HALF, "master"),
    Case("AdamW", "wrapper", _HALF, "kahan"),
    Case("AdamW", "wrapper", _HALF, "stochastic"),
    Case("AdamW", "class"),
    Case("AdamW", "class", _HALF, "kahan", torch.float32),
    Case("AdamW", "class", _HALF, "stochastic", torch.float32),
    Case("SGD", "wrapper"),
    Case("SGD", "wrapper", _HALF, "kahan"),
    Case("SGD", "class", _HALF, "master"),
    Case("SGD", "class", _HALF, "stochastic"),
]
TORCH_CASES = [
    Case(rule, "torch", dtype)
    for rule in ("AdamW", "SGD")
    for dtype in (torch.float32, torch.bfloat16)
]
# These are read by optimizers with options that did not exist when the checkpoint was made.
OLD_CASES = [case for case in CASES if case.kind == "wrapper"]
# These are also saved as whole tensors.
FULL_CASES = [CASES[i] for i in (0, 2, 7, 9, 11)]
OLD_KEYS = ("rounded_steps", "skipped_steps", "clipped_steps", "l1", "clip_value")
OLD_STATE = ("master_param", "kahan_compensation")


def network(case: Case, seed: int) -> Network:
    """Return a network whose parameters are multiples of 1/64, which every dtype can hold."""
    made = Network()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in made.parameters():
            param.copy_(torch.randint(-99, 100, param.shape, generator=generator) / 64)
    return made.to(case.dtype)


def give(net: nn.Module, step: int) -> None:
    """Set gradients that are multiples of 1/8, so that sums of their squares are exact in any order."""
    generator = torch.Generator().manual_seed(step)
    for param in net.parameters():
        whole = torch.randint(-8, 9, param.shape, generator=generator).to(param.dtype) / 8
        if step == _SKIPPED and param.dim() == 2:
            whole[0, 0] = torch.nan
        param.grad = like(param, whole)


def like(param: Tensor, whole: Tensor) -> Tensor:
    """Return the same elements, shared as the parameter is."""
    if not isinstance(param, DTensor):
        return whole
    shared: Tensor = distribute_tensor(
        whole, param.device_mesh, param.placements, src_data_rank=None
    )
    return shared


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give(net, step)
        if step == _SKIPPED and not isinstance(optimizer, StabilizedOptimizer):
            continue
        optimizer.step()
    net.zero_grad()


def local(value: Any) -> Any:
    """Return a copy of this rank's part."""
    if not isinstance(value, Tensor):
        return value
    part = value.to_local() if isinstance(value, DTensor) else value
    return part.detach().clone()


def contents(net: nn.Module, optimizer: torch.optim.Optimizer) -> Found:
    """Return everything that has to survive, by the parameters' names, with this rank's parts of tensors."""
    state = {
        name: {key: local(value) for key, value in optimizer.state[param].items()}
        for name, param in net.named_parameters()
    }
    groups = [
        {k: v for k, v in group.items() if k != "params"}
        for group in optimizer.state_dict()["param_groups"]
    ]
    weights = {name: local(param) for name, param in net.named_parameters()}
    return {"weights": weights, "state": state, "groups": groups}


def joined(parts: list[Any]) -> Any:
    """Combine the contents of all ranks to those of one process; parameters are sharded by rows."""
    first = parts[0]
    if isinstance(first, dict):
        # Some keys of whole state dicts are unknown to torch's optimizers, and torch leaves them on rank 0 alone.
        shared = [key for key in first if all(key in part for part in parts)]
        return {key: joined([part[key] for part in parts]) for key in shared}
    if isinstance(first, list):
        return [joined(list(each)) for each in zip(*parts, strict=True)]
    if isinstance(first, Tensor) and first.dim() > 0:
        return torch.cat(parts)
    assert all(part == first for part in parts)  # counters are the same on all ranks
    return first
