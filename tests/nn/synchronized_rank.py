"""One rank of a gloo group: runs every case and every situation, and leaves what it found in a file."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from steadygrad.nn import synchronized
from steadygrad.nn.gradient import Options
from steadygrad.nn.synchronized import synchronized_batch_norm
from steadygrad.reference.batch_norm import CEILINGS, Activation
from tests.backends import BACKENDS
from tests.nn.synchronized_cases import (
    CASES,
    EMULATED_CASES,
    EPS,
    Case,
    part_of,
    vectors,
    whole_batch,
)
from tests.nn.synchronized_network import Network
from tests.ranks import leave_ranks

Found = dict[str, Any]


def norm(
    input: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None] = (None, None, None),
    momentum: float | None = 0.1,
    activation: Activation | None = None,
    group: Any = None,
) -> Tensor:
    group = dist.group.WORLD if group is None else group
    options = Options(*running, True, momentum, EPS, CEILINGS[activation])
    return synchronized_batch_norm(input, residual, weight, bias, options, group)


def new_running(channels: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(channels, dtype=dtype), torch.ones(channels, dtype=dtype), torch.tensor(0)


def run_case(case: Case, rank: int) -> Found:
    running = new_running(case.shape[0], case.vector_dtype)
    for step in range(case.steps):
        part = part_of(case, whole_batch(case, step), rank)
        given = (part.input, part.residual, *vectors(case))
        leaves = [None if t is None else t.requires_grad_() for t in given]
        output = norm(*leaves, running, case.momentum, case.activation)
        assert output.stride() == part.input.stride() and output.dtype == case.dtype
        output.backward(part.grad_output)
    names = ("input", "residual", "weight", "bias")
    grads = {name: t.grad for name, t in zip(names, leaves, strict=True) if t is not None}
    return {"output": output.detach(), "grads": grads, "running": running}


def message(call: Callable[[], object]) -> tuple[str, str]:
    """Return type and message of the exception that the call raises."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def samples(rank: int, rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return rows of 3 channels, different on each rank."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(rows, 3, generator=generator, dtype=dtype)


def only_one_input_requires_a_gradient(rank: int, world: int) -> Found:
    input = samples(rank, rank + 2).requires_grad_(rank == 0)
    output = norm(input)
    (output * torch.arange(3) * output).sum().backward()
    return {"requires_grad": output.requires_grad, "grad": input.grad}


def one_rank_has_only_its_weight_to_train(rank: int, world: int) -> Found:
    input = samples(rank, rank + 2).requires_grad_(rank == 0)
    weight = torch.full((3,), 2.0, dtype=torch.float64).requires_grad_(rank == 1)
    output = norm(input, None, weight)
    (output * torch.arange(3) * output).sum().backward()
    return {"grad": input.grad, "weight": weight.grad}


def only_the_residual_of_an_empty_rank_requires_a_gradient(rank: int, world: int) -> Found:
    input = samples(rank, 3 * rank)
    residual = samples(rank + 7, 3 * rank).requires_grad_(rank == 0)
    output = norm(input, residual, activation="relu")
    output.sum().backward()
    return {"requires_grad": output.requires_grad, "grad": residual.grad}


def nothing_requires_a_gradient(rank: int, world: int) -> Found:
    return {"requires_grad": norm(samples(rank, rank + 2)).requires_grad}


def gradients_off_on_all(rank: int, world: int) -> Found:
    running = new_running(3)
    input = samples(rank, 2 * rank).requires_grad_()
    with torch.no_grad():
        outputs = norm(input, running=running)
    with torch.inference_mode():
        outputs = norm(input, running=running)
    return {"output": outputs.clone(), "batches": running[2]}


def gradients_off_on_one(rank: int, world: int) -> Found:
    input = samples(rank, 3).requires_grad_()
    with torch.set_grad_enabled(rank != 1):
        output = norm(input)
    return {"raised": message(lambda: output.sum().backward())}


def one_value_on_all_ranks_together(rank: int, world: int) -> Found:
    running = new_running(3)
    input = samples(rank, int(rank == 1))
    return {"raised": message(lambda: norm(input, running=running)), "running": running}


def empty_on_all_ranks(rank: int, world: int) -> Found:
    running = new_running(3)
    input = samples(rank, 0).requires_grad_()
    weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    output = norm(input, None, weight, bias, running, activation="relu")
    output.sum().backward()
    grads = {"input": input.grad, "weight": weight.grad, "bias": bias.grad}
    return {"output": output.detach(), "grads": grads, "running": running}


def gradient_penalty(rank: int, world: int) -> Found:
    found: Found = {}
    for fusion in ("plain", "relu", "add_relu", "add_relu6"):
        case = Case((4, 0, 3) if world == 3 else (4, 3), (3, 5), torch.float64, fusion)
        part = part_of(case, whole_batch(case, 0), rank)
        given = (part.input, part.residual, *vectors(case))
        leaves = [None if t is None else t.requires_grad_() for t in given]
        grad_output = part.grad_output.requires_grad_()
        output = norm(*leaves, activation=case.activation)
        wanted = [t for t in leaves if t is not None]
        grads = torch.autograd.grad(output, wanted, grad_output, create_graph=True)
        # of this rank's gradients of weight and bias, in which it is linear, as its parts add up
        sum(g.pow(2).sum() if g.dim() > 1 else g.sum() for g in grads).backward()
        found[fusion] = [t.grad for t in (grad_output, leaves[0], leaves[2])]
    return found


def gradient_penalty_of_different_inputs(rank: int, world: int) -> Found:
    """Give only the first rank's gradient a gradient; the others take part in its double backward all the same."""
    input = samples(rank, rank + 2).requires_grad_(rank == 0)
    residual = samples(rank + 7, rank + 2).requires_grad_(rank > 0)
    output = norm(input, residual, activation="relu")
    leaf = input if rank == 0 else residual
    (grad,) = torch.autograd.grad(output, leaf, samples(rank + 9, rank + 2), create_graph=True)
    grad.pow(2).sum().backward()
    return {"grad": input.grad}


def a_group_of_one(rank: int, world: int) -> Found:
    groups = [dist.new_group([r]) for r in range(world)]
    case = Case((4,), (3, 5), fusion="add_relu6")
    batch = whole_batch(case, 0)
    given = (batch.input, batch.residual, *vectors(case))
    leaves = [None if t is None else t.requires_grad_() for t in given]
    running = new_running(3)
    output = norm(*leaves, running, activation=case.activation, group=groups[rank])
    output.backward(batch.grad_output)
    grads = [t.grad for t in leaves if t is not None]
    lonely = message(lambda: norm(samples(rank, 1), group=groups[rank]))
    stranger = message(lambda: norm(samples(rank, 2), group=groups[rank - 1]))
    return {
        "output": output.detach(),
        "grads": grads,
        "running": running,
        "lonely": lonely,
        "stranger": stranger,
    }


def refused_groups(rank: int, world: int) -> Found:
    group = dist.new_group(list(range(world)))
    alive = norm(samples(rank, 2), group=group)
    dist.destroy_process_group(group)
    return {
        "alive": alive,
        "destroyed": message(lambda: norm(samples(rank, 2), group=group)),
        "name": message(lambda: norm(samples(rank, 2), group="world")),
    }


def saved_whole(rank: int, world: int) -> Found:
    """Save a module with the default group, and one with another group of the same ranks."""
    stored = io.BytesIO()
    torch.save(Network(), stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    copied = copy.deepcopy(pickle.loads(pickle.dumps(loaded)))
    other = Network()
    other.norm.process_group = dist.new_group(list(range(world)))
    return {
        "same group": all(m.norm.process_group is dist.group.WORLD for m in (loaded, copied)),
        "outputs": [m(samples(rank, 2)).detach() for m in (Network(), loaded, copied, other)],
        "copied": copy.deepcopy(other).norm.process_group is other.norm.process_group,
        "other": message(lambda: pickle.dumps(other)),
        "file": stored.getvalue(),
    }


def data_parallel(rank: int, world: int) -> Found:
    model = nn.parallel.DistributedDataParallel(Network())
    found: Found = {}
    for step, rows in enumerate((3 * rank, 2)):  # one rank is empty in the first step
        model.zero_grad()
        model(samples(rank, rows)).pow(2).sum().backward()
        for name, parameter in model.module.named_parameters():
            assert parameter.grad is not None
            found[f"{step}.{name}"] = parameter.grad.clone()
    if rank == 0:  # evaluation needs no other rank
        found["evaluated"] = model.module.eval()(samples(rank, 2)).detach()
        model.module.norm.running_mean = model.module.norm.running_var = None
        found["untracked"] = model.module(samples(rank, 2)).detach()
    return found


def compiled(rank: int, world: int) -> Found:
    if world != 2:
        return {}

    def step(input: Tensor) -> Tensor:
        return norm(input.sin(), activation="relu").cos()

    found = []
    for function in (step, torch.compile(step, backend="aot_eager")):
        input = samples(rank, 3 * rank + 1).requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Dynamo makes torch warn where a graph breaks
            output = function(input)
        output.sum().backward()
        found.append([output.detach(), input.grad])
    return {"eager": found[0], "compiled": found[1]}


def without_the_host(rank: int, world: int) -> Found:
    """Run as on a device that the host does not wait for, where it cannot know what the others have."""
    emulated = next(backend for backend in BACKENDS if backend.name == "emulated")
    known = synchronized.is_asynchronous
    synchronized.is_asynchronous = lambda device: True
    try:
        with emulated.active() if emulated.why_not() is None else nullcontext():
            return {
                "one": only_one_input_requires_a_gradient(rank, world),
                "nothing": nothing_requires_a_gradient(rank, world),
                "empty": empty_on_all_ranks(rank, world),
                "single": norm(
                    samples(rank, int(rank == 1)), bias=torch.arange(3.0, dtype=torch.float64)
                ),
            }
    finally:
        synchronized.is_asynchronous = known


SITUATIONS = (
    only_one_input_requires_a_gradient,
    one_rank_has_only_its_weight_to_train,
    only_the_residual_of_an_empty_rank_requires_a_gradient,
    nothing_requires_a_gradient,
    gradients_off_on_all,
    gradients_off_on_one,
    one_value_on_all_ranks_together,
    empty_on_all_ranks,
    gradient_penalty,
    gradient_penalty_of_different_inputs,
    a_group_of_one,
    refused_groups,
    saved_whole,
    data_parallel,
    compiled,
    without_the_host,
)


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    found: dict[str, Found] = {}
    for backend, cases in zip(BACKENDS, (CASES, EMULATED_CASES, []), strict=True):
        if backend.why_not() is not None:
            continue
        with backend.active():
            for case in cases:
                if len(case.counts) == world:
                    sys.stderr.write(f"{backend} {case}\n")
                    found[f"{backend} {case}"] = run_case(case, rank)
    for situation in SITUATIONS:
        sys.stderr.write(f"{situation.__name__}\n")
        found[situation.__name__] = situation(rank, world)
    leave_ranks(found, rank, folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
