"""One rank of a gloo group: policies over parameters that differ from rank to rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import steadygrad as sg
from tests.backends import BACKENDS
from tests.policies.policy_runs import CLIPS, Driven, recorded_norms
from tests.policies.python_policies import PYTHON
from tests.ranks import join_ranks, leave_ranks

CASES = {**CLIPS, **PYTHON}
NAMES = ("percentile-window", "zscore-uncapped", "relative-short", "damp", "python-zscore")
BACKENDS_RUN = [backend for backend in BACKENDS[:2] if backend.why_not() is None]
STEPS = 80


def norms_of(rank: int) -> list[tuple[float | None, float | None]]:
    """Return the norms of a rank's two parameters; the second one has gradients on the first rank alone."""
    first, second = recorded_norms(STEPS, seed=rank), recorded_norms(STEPS, seed=7)
    return [(a, b if rank == 0 else None) for a, b in zip(first, second, strict=True)]


def run(name: str, scope: Any, rank: int) -> dict[str, Any]:
    driven = Driven(
        2,
        torch.device("cpu"),
        clip=CASES[name].policy(),
        skip=sg.SkipSpikes(5.0, window=16),
        clip_scope=scope,
        reduce_norm=dist.group.WORLD,
    )
    taken = [driven.step(*norms) for norms in norms_of(rank)]
    counts = (driven.optimizer.skipped_steps, driven.optimizer.clipped_steps)
    return {"taken": taken, "learnt": driven.learnt(), "counts": counts}


class RaisesOnTheLastRank(sg.ClipPolicy):
    """A policy that raises on one rank when it is asked a second time."""

    def __init__(self) -> None:
        self.asked = 0

    def limits(self, norms: torch.Tensor) -> float:
        self.asked += 1
        if self.asked == 2 and dist.get_rank() == dist.get_world_size() - 1:
            raise OSError("no space left on this rank")
        return 0.5


def raising(rank: int) -> dict[str, Any]:
    """Take three steps, of which the second is refused; return what each raised, and the parameter after it."""
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = sg.optim.SGD(
        [param], lr=0.1, clip=RaisesOnTheLastRank(), reduce_norm=dist.group.WORLD
    )
    raised, values = [], []
    for _ in range(3):
        param.grad = torch.full((2,), 3.0)
        try:
            optimizer.step()
            raised.append("nothing")
        except (OSError, RuntimeError) as error:
            raised.append(str(error))
        values.append(param.detach().clone())
    return {"raised": raised, "values": values, "clipped": optimizer.clipped_steps}


def main(rank: int, world: int, folder: Path) -> None:
    join_ranks(rank, world, folder)
    found = {}
    for backend in BACKENDS_RUN:
        with backend.active():
            for name in NAMES:
                for scope in ("global", "group"):
                    found[f"{backend}-{name}-{scope}"] = run(name, scope, rank)
            found[f"{backend}-raising"] = raising(rank)
    leave_ranks(found, rank, folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
