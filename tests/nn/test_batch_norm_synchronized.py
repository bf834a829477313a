"""Batch normalization over two and three ranks against the whole batch in one process."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from steadygrad.nn.functional import batch_norm
from tests import ranks as processes
from tests.backends import BACKENDS
from tests.nn.synchronized_cases import (
    CASES,
    EMULATED_CASES,
    EPS,
    Case,
    activated,
    expected,
    vectors,
    whole_batch,
)
from tests.nn.synchronized_network import Network
from tests.nn.synchronized_rank import new_running, samples
from tests.ranks import Found

RANK = Path(__file__).with_name("synchronized_rank.py")
TIME_LIMIT = 110  # seconds for all that the ranks of one world run

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


def found(world: int, name: str) -> Found:
    return processes.found(RANK, world, TIME_LIMIT, name)


@pytest.fixture(params=[2, 3])
def world(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


def error(actual: Tensor, exact: Tensor) -> float:
    """Return the largest deviation, relative to the largest magnitude if that is above 1."""
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return 0
    return float((actual.double() - exact).abs().max() / exact.abs().max().clamp(min=1))


def assert_rounded(actual: Tensor, exact: Tensor) -> None:
    """Check that a half-precision result has no error but its own rounding."""
    assert actual.shape == exact.shape
    info = torch.finfo(actual.dtype)
    bound = 0.51 * info.eps * exact.abs() + info.smallest_normal * info.eps + 1e-6
    assert ((actual.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_find_what_one_process_finds_for_the_whole_batch(case: Case) -> None:
    assert_equals_the_whole_batch(case, found(len(case.counts), f"cpu {case}"))


@pytest.mark.parametrize("case", EMULATED_CASES, ids=str)
def test_ranks_on_a_device_that_the_host_does_not_wait_for(case: Case) -> None:
    why_not = next(b for b in BACKENDS if b.name == "emulated").why_not()
    if why_not is not None:
        pytest.skip(why_not)
    assert_equals_the_whole_batch(case, found(len(case.counts), f"emulated {case}"))


def assert_equals_the_whole_batch(case: Case, ranks: Found) -> None:
    whole = expected(case)
    tolerance = 1e-13 if case.dtype == torch.float64 else 1e-6
    for name, exact in {"output": whole.output, **whole.grads}.items():
        parts = [r["output"] if name == "output" else r["grads"][name] for r in ranks]
        if name in ("weight", "bias"):
            assert error(sum(part.double() for part in parts), exact) <= tolerance
            continue
        assert [len(part) for part in parts] == list(case.counts)
        actual = torch.cat(parts)
        assert actual.dtype == case.dtype
        if case.dtype in (torch.float16, torch.bfloat16):
            assert_rounded(actual, exact)
        else:
            assert error(actual, exact) <= tolerance
    for rank in ranks:
        mean, var, batches = rank["running"]
        assert error(mean, whole.running_mean) <= tolerance
        assert error(var, whole.running_var) <= tolerance
        assert int(batches) == case.steps
        assert torch.equal(mean, ranks[0]["running"][0])  # all ranks have the same bits
        assert torch.equal(var, ranks[0]["running"][1])


def whole_of(rows: list[int]) -> Tensor:
    return torch.cat([samples(rank, n) for rank, n in enumerate(rows)]).requires_grad_()


def squares(output: Tensor) -> Tensor:
    return (output * torch.arange(3) * output).sum()


@pytest.mark.parametrize("waits", [True, False])
def test_a_rank_without_gradients_of_its_own_joins_the_backward_of_another(
    world: int, waits: bool
) -> None:
    if waits:
        ranks = found(world, "only_one_input_requires_a_gradient")
    else:
        ranks = [r["one"] for r in found(world, "without_the_host")]
    input = whole_of([rank + 2 for rank in range(world)])
    squares(F.batch_norm(input, None, None, training=True, eps=EPS)).backward()
    assert input.grad is not None
    assert all(rank["requires_grad"] for rank in ranks)
    torch.testing.assert_close(ranks[0]["grad"], input.grad[:2])
    assert all(rank["grad"] is None for rank in ranks[1:])


def test_a_rank_may_have_only_its_weight_to_train(world: int) -> None:
    ranks = found(world, "one_rank_has_only_its_weight_to_train")
    input = whole_of([rank + 2 for rank in range(world)])
    normalized = F.batch_norm(input, None, None, training=True, eps=EPS)
    squares(2 * normalized).backward()
    assert input.grad is not None
    torch.testing.assert_close(ranks[0]["grad"], input.grad[:2])
    own = normalized.detach()[2:5]
    torch.testing.assert_close(ranks[1]["weight"], (4 * torch.arange(3) * own * own).sum(0))
    assert [rank["weight"] is None for rank in ranks] == [rank != 1 for rank in range(world)]


def test_the_residual_of_an_empty_rank_is_reason_enough_for_a_graph_on_all(world: int) -> None:
    ranks = found(world, "only_the_residual_of_an_empty_rank_requires_a_gradient")
    assert all(rank["requires_grad"] for rank in ranks)
    assert ranks[0]["grad"].shape == (0, 3)


def test_no_graph_where_nothing_requires_a_gradient_on_any_rank(world: int) -> None:
    ranks = found(world, "nothing_requires_a_gradient")
    ranks += [r["nothing"] for r in found(world, "without_the_host")]
    assert not any(rank["requires_grad"] for rank in ranks)


def test_gradients_off_on_all_ranks(world: int) -> None:
    ranks = found(world, "gradients_off_on_all")
    input = whole_of([2 * rank for rank in range(world)])
    exact = F.batch_norm(input, None, None, training=True, eps=EPS).detach()
    torch.testing.assert_close(torch.cat([rank["output"] for rank in ranks]), exact)
    assert [int(rank["batches"]) for rank in ranks] == [2] * world


def test_backward_names_the_rank_that_cannot_join_instead_of_waiting_for_it(world: int) -> None:
    ranks = found(world, "gradients_off_on_one")
    for rank, result in enumerate(ranks):
        kind, message = result["raised"]
        assert kind == "RuntimeError"
        assert ("ranks [1] ran forward with gradients off" in message) == (rank != 1)


def test_one_value_on_all_ranks_together_is_an_error_on_each(world: int) -> None:
    for rank in found(world, "one_value_on_all_ranks_together"):
        kind, message = rank["raised"]
        assert kind == "ValueError"
        assert f"got 1 on the {world} ranks" in message
        for after, before in zip(rank["running"], new_running(3), strict=True):
            assert torch.equal(after, before)


def test_one_value_on_all_ranks_together_where_the_host_does_not_know(world: int) -> None:
    outputs = [rank["single"] for rank in found(world, "without_the_host")]
    assert [len(output) for output in outputs] == [int(rank == 1) for rank in range(world)]
    assert torch.equal(outputs[1], torch.arange(3.0, dtype=torch.float64)[None])


def test_empty_on_all_ranks(world: int) -> None:
    ranks = found(world, "empty_on_all_ranks")
    ranks += [r["empty"] for r in found(world, "without_the_host")]
    for rank in ranks:
        assert rank["output"].shape == rank["grads"]["input"].shape == (0, 3)
        assert torch.equal(rank["grads"]["weight"], torch.zeros(3))
        assert torch.equal(rank["grads"]["bias"], torch.zeros(3))
        mean, var, batches = rank["running"]
        assert torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3))
        assert int(batches) == 1


@pytest.mark.parametrize("fusion", ["plain", "relu", "add_relu", "add_relu6"])
def test_double_backward(world: int, fusion: str) -> None:
    ranks = [rank[fusion] for rank in found(world, "gradient_penalty")]
    case = Case((4, 0, 3) if world == 3 else (4, 3), (3, 5), torch.float64, fusion)
    batch = whole_batch(case, 0)
    weight, bias = vectors(case)
    given = (batch.input, batch.residual, weight, bias, batch.grad_output)
    leaves = [t.requires_grad_() for t in given if t is not None]
    output = F.batch_norm(batch.input, None, None, weight, bias, training=True, eps=EPS)
    output = output if batch.residual is None else output + batch.residual
    output = activated(output, case)
    grads = torch.autograd.grad(output, leaves[:-1], batch.grad_output, create_graph=True)
    torch.stack([g.pow(2).sum() if g.dim() > 1 else g.sum() for g in grads]).sum().backward()
    assert weight is not None
    for place, leaf in enumerate((batch.grad_output, batch.input, weight)):
        parts = [rank[place] for rank in ranks]
        actual = sum(parts) if leaf is weight else torch.cat(parts)
        torch.testing.assert_close(actual, leaf.grad, rtol=1e-10, atol=1e-10)


def test_all_ranks_join_the_double_backward_of_one(world: int) -> None:
    ranks = found(world, "gradient_penalty_of_different_inputs")
    input = whole_of([rank + 2 for rank in range(world)])
    residual, grad_output = (
        torch.cat([samples(rank + offset, rank + 2) for rank in range(world)]) for offset in (7, 9)
    )
    output = (F.batch_norm(input, None, None, training=True, eps=EPS) + residual).relu()
    (grad,) = torch.autograd.grad(output, input, grad_output, create_graph=True)
    grad[:2].pow(2).sum().backward()
    assert input.grad is not None
    torch.testing.assert_close(ranks[0]["grad"], input.grad[:2], rtol=1e-10, atol=1e-10)


def test_a_group_of_one_gives_the_bits_of_a_process_alone(world: int) -> None:
    case = Case((4,), (3, 5), fusion="add_relu6")
    batch = whole_batch(case, 0)
    given = (batch.input, batch.residual, *vectors(case))
    leaves = [t.requires_grad_() for t in given if t is not None]
    running = new_running(3)
    mean, var, batches = running
    options = {"residual": leaves[1], "activation": case.activation, "num_batches_tracked": batches}
    output = batch_norm(leaves[0], mean, var, *leaves[2:], True, 0.1, EPS, **options)
    output.backward(batch.grad_output)
    exact = [output.detach(), *(leaf.grad for leaf in leaves), *running]
    for rank in found(world, "a_group_of_one"):
        for a, b in zip([rank["output"], *rank["grads"], *rank["running"]], exact, strict=True):
            assert torch.equal(a, b)
        assert rank["lonely"][0] == "ValueError"
        assert rank["stranger"][0] == "RuntimeError"
        assert "member" in rank["stranger"][1]


def test_groups_that_are_refused(world: int) -> None:
    for rank in found(world, "refused_groups"):
        assert rank["alive"].shape == (2, 3)
        assert rank["destroyed"][0] == "RuntimeError"
        assert "process_group: expected an initialized group" in rank["destroyed"][1]
        assert rank["name"][0] == "TypeError"
        assert "got str" in rank["name"][1]


def test_a_module_over_the_default_group_can_be_saved_whole(world: int) -> None:
    """Load the module where there are no other processes, as is possible with torch's SyncBatchNorm."""
    for rank in found(world, "saved_whole"):
        assert rank["same group"] and rank["copied"]
        for output in rank["outputs"]:
            assert torch.equal(output, rank["outputs"][0])
        kind, text = rank["other"]
        assert kind == "PicklingError"
        assert "process_group: expected None or the default group" in text
        assert "save model.state_dict() instead" in text
        alone = torch.load(io.BytesIO(rank["file"]), weights_only=False)
        assert alone.norm.process_group is None
        alone.norm.momentum = 1.0
        input = samples(0, 4)
        alone(input)
        torch.testing.assert_close(alone.norm.running_mean, alone.first(input).detach().mean(0))


def test_gradients_of_distributed_data_parallel_are_the_mean_of_the_whole(world: int) -> None:
    ranks = found(world, "data_parallel")
    for step, rows in enumerate(([3 * rank for rank in range(world)], [2] * world)):
        model = Network()
        hidden = model.first(whole_of(rows).detach())
        affine = (model.norm.weight, model.norm.bias)
        hidden = F.batch_norm(hidden, None, None, *affine, True, eps=EPS).relu()
        (model.last(hidden).pow(2).sum() / world).backward()
        for name, parameter in model.named_parameters():
            for rank in ranks:
                torch.testing.assert_close(rank[f"{step}.{name}"], parameter.grad)


def test_evaluation_takes_the_statistics_of_its_own_batch(world: int) -> None:
    """Evaluate without running statistics on one rank alone, which would otherwise wait for the others."""
    model = Network()
    hidden = model.first(samples(0, 2))
    affine = (model.norm.weight, model.norm.bias)
    expected = model.last(F.batch_norm(hidden, None, None, *affine, True, eps=EPS).relu())
    torch.testing.assert_close(found(world, "data_parallel")[0]["untracked"], expected)


def test_compiled_code_breaks_its_graph_and_keeps_its_bits() -> None:
    for rank in found(2, "compiled"):
        for eager, compiled in zip(rank["eager"], rank["compiled"], strict=True):
            assert torch.equal(eager, compiled)
