"""Training runs that ranks share, and what one process with torch's clip and optimizers finds for the whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.optim import unfused

STEPS = 11  # of which two have spikes
MAX_NORM = 0.7


@dataclass(frozen=True)
class Case:
    """Some steps of one optimizer."""

    layout: str  # how parameters are shared: a network's name, or "tensors"
    world: int
    rule: str = "adamw"
    scope: str = "global"
    p: float = 2.0
    l2: float = 0.0
    backend: str = "cpu"
    steps: int = STEPS

    def __str__(self) -> str:
        words = [self.backend, self.layout, str(self.world), self.rule, self.scope, f"{self.p:g}"]
        return "-".join(words + (["l2"] if self.l2 else []))

    @property
    def group_count(self) -> int:
        return 2

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return torch's optimizer over these param groups."""
        if self.rule == "sgd":
            return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)
        if self.rule == "adadelta":
            return unfused.Adadelta(groups, lr=0.5)
        return torch.optim.AdamW(groups, lr=0.02, weight_decay=0.05, eps=1e-4)


NETWORKS = ("fsdp", "tp", "fsdp_tp", "hsdp")

CASES = [
    *(Case("fsdp", world, rule) for world in (2, 4) for rule in ("sgd", "adamw")),
    Case("tp", 2),
    Case("tp", 2, "sgd"),
    Case("fsdp_tp", 4),
    Case("fsdp_tp", 4, "sgd", scope="group"),
    Case("hsdp", 4),
    Case("fsdp_tp", 4, p=torch.inf),
    Case("fsdp", 2, "adadelta"),
    Case("fsdp_tp", 4, "adadelta", scope="tensor"),
    *(
        Case("tensors", world, scope=scope, p=p, l2=l2, steps=6)
        for world in (2, 4)
        for scope in ("global", "group", "tensor")
        for p, l2 in ((1.0, 0.0), (2.0, 0.1), (torch.inf, 0.0), (3.0, 0.0))
    ),
    Case("tensors", 4, "sgd", steps=6),
    Case("tensors", 4, "adadelta", l2=0.1, steps=6),
]
EMULATED_CASES = [
    Case("fsdp", 2, backend="emulated"),
    Case("fsdp_tp", 4, "sgd", backend="emulated", steps=8),
    *(
        Case("tensors", world, scope=scope, p=p, l2=l2, backend="emulated", steps=5)
        for world in (2, 4)
        for scope, p, l2 in (
            ("global", 2.0, 0.1),
            ("group", 3.0, 0.0),
            ("tensor", 2.0, 0.0),
            ("tensor", 3.0, 0.0),
            ("global", torch.inf, 0.0),
            ("group", 1.0, 0.0),
        )
    ),
    Case("tensors", 4, "adadelta", backend="emulated", steps=5),
]


class Network(nn.Module):
    """Two layers to split over ranks, and a normalization layer that tensor parallelism does not split."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 3)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.down(torch.tanh(self.up(self.norm(input))))
        return output


def groups_of(network: nn.Module) -> list[dict[str, Any]]:
    """Return the network's parameters as two param groups, in the order of their names."""
    named = dict(network.named_parameters())
    down = [name for name in named if name.startswith("down")]
    return [
        {"params": [p for name, p in named.items() if name not in down]},
        {"params": [named[name] for name in down]},
    ]


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return eight samples; every seventh step's targets are far off, so that gradients spike."""
    generator = torch.Generator().manual_seed(100 + step)
    spike = 300.0 if step % 7 == 3 else 1.0
    return (
        torch.randn(8, 6, generator=generator),
        spike * torch.randn(8, 3, generator=generator),
    )


# Shapes of the parameters of "tensors": some do not divide by the number of ranks, some leave ranks without elements.
SHAPES = [(5, 3), (1, 2), (4, 6), (3,), (7, 2), (2, 9), ()]
FIRST_GROUP = 4


def whole_params() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def whole_grads(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    spike = 1e3 if step % 7 == 3 else 1.0
    return [spike * torch.randn(shape, generator=generator) for shape in SHAPES]


@dataclass
class Expected:
    norms: list[float]
    weights: list[Tensor]


def expected(case: Case) -> Expected:
    """Take the same steps in one process."""
    if case.layout == "tensors":
        params = [nn.Parameter(p) for p in whole_params()]
        groups = [{"params": params[:FIRST_GROUP]}, {"params": params[FIRST_GROUP:]}]
        network = None
    else:
        network = Network()
        groups = groups_of(network)
        params = [p for group in groups for p in group["params"]]
    optimizer = case.optimizer(groups)
    norms = []
    for step in range(case.steps):
        if network is None:
            for param, grad in zip(params, whole_grads(step), strict=True):
                param.grad = grad
        else:
            optimizer.zero_grad()
            input, target = batch(step)
            nn.functional.mse_loss(network(input), target).backward()
        for param in params:
            assert param.grad is not None
            param.grad += case.l2 * param.detach()
        limited = {
            "global": [params],
            "group": [group["params"] for group in optimizer.param_groups],
            "tensor": [[param] for param in params],
        }[case.scope]
        norms.append(
            float(nn.utils.get_total_norm([p.grad for p in params if p.grad is not None], case.p))
        )
        for scope in limited:
            nn.utils.clip_grad_norm_(scope, MAX_NORM, case.p)
        optimizer.step()
    return Expected(norms, [param.detach() for param in params])
