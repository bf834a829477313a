"""One rank of a gloo group: runs every case and every situation, and leaves what it found in a file."""

from __future__ import annotations

import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

import steadygrad as sg
from tests.backends import BACKENDS
from tests.distributed.sharded_cases import CASES, EMULATED_CASES, MAX_NORM, Case
from tests.distributed.sharded_layouts import Meshes, local, training, whole
from tests.distributed.sharded_precision import PRECISION
from tests.distributed.sharded_refusals import REFUSALS
from tests.distributed.sharded_situations import SITUATIONS
from tests.ranks import leave_ranks

Found = dict[str, Any]


def run_case(case: Case, meshes: Meshes) -> Found:
    trained = training(case.layout, meshes, case.world)
    optimizer = sg.Stabilizer(
        case.optimizer(trained.groups),
        max_norm=MAX_NORM,
        norm_type=case.p,
        clip_scope=case.scope,
        l2=case.l2,
    )
    norms = []
    collectives: dict[str, int] = {}
    for step in range(case.steps):
        trained.backward(step)
        if step == 2:  # this step has no partial gradients, which need collectives of their own
            with CommDebugMode() as mode:
                optimizer.step()
            collectives = {str(op): count for op, count in mode.get_comm_counts().items()}
        else:
            optimizer.step()
        norms.append(float(optimizer.grad_norm))
    state = [
        {k: type(v).__name__ for k, v in optimizer.state[p].items()}
        for p in trained.params
        if p in optimizer.state
    ]
    return {
        "path": optimizer.path,
        "norms": norms,
        "weights": [whole(param) for param in trained.params],
        "locals": [local(param).detach().clone() for param in trained.params],
        "types": [type(param).__name__ for param in trained.params],
        "state": state,
        "collectives": collectives,
        "clipped": optimizer.clipped_steps,
        "skipped": optimizer.skipped_steps,
    }


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    # fully_shard warns of tensor parallel layers, whatever is done with their output.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    meshes = Meshes(world)
    found: dict[str, Any] = {}
    for backend, cases in zip(BACKENDS, (CASES, EMULATED_CASES, []), strict=True):
        if backend.why_not() is not None:
            continue
        with backend.active():
            for case in cases:
                if case.world == world:
                    sys.stderr.write(f"{case}\n")
                    found[str(case)] = run_case(case, meshes)
            for situation in (*SITUATIONS, *PRECISION):
                sys.stderr.write(f"{backend} {situation.__name__}\n")
                found[f"{backend} {situation.__name__}"] = situation(rank, world, meshes)
    for refusal in REFUSALS:
        sys.stderr.write(f"{refusal.__name__}\n")
        found[refusal.__name__] = refusal(rank, world, meshes)
        dist.barrier()  # a rank that asks again at once might be answered by one that still waits
    leave_ranks(found, rank, folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
