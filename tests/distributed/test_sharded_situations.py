"""Further situations of ranks that share parameters: non-finite elements on one rank, absent gradients, functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steadygrad as sg
from tests.backends import BACKENDS, Backend, backend_parameters
from tests.distributed.sharded_cases import FIRST_GROUP, whole_grads, whole_params
from tests.distributed.test_sharded import found as found_by_name
from tests.distributed.test_sharded import pytestmark as pytestmark
from tests.optim import unfused
from tests.ranks import Found

NORMS = (2.0, 1.0, torch.inf, 3.0, 0.0, -torch.inf, -2.0)


@pytest.fixture(params=[2, 4])
def world(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


@pytest.fixture(params=backend_parameters(BACKENDS[:2]))
def ran_on(request: pytest.FixtureRequest) -> Backend:
    """Return the backend on which the ranks ran their kernels; this process only reads what they found."""
    chosen: Backend = request.param
    if chosen.why_not() is not None:
        pytest.skip(str(chosen.why_not()))
    return chosen


def found(world: int, ran_on: Backend, name: str) -> Found:
    return found_by_name(world, f"{ran_on} {name}")


def whole_parameters(step: int = 0) -> list[nn.Parameter]:
    params = [nn.Parameter(value) for value in whole_params()]
    for param, grad in zip(params, whole_grads(step), strict=True):
        param.grad = grad
    return params


def grads_of(params: list[nn.Parameter]) -> list[Tensor]:
    return [param.grad for param in params if param.grad is not None]


def assert_close(actual: Any, exact: Any) -> None:
    torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-6)


def assert_same_everywhere(ranks: Found, name: str) -> None:
    for rank in ranks:
        for a, b in zip(rank[name], ranks[0][name], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("place", range(7))
def test_a_nan_on_one_rank_skips_the_step_on_all(world: int, ran_on: Backend, place: int) -> None:
    for rank in found(world, ran_on, "nan_on_one_rank"):
        skip = rank[f"skip {place}"]
        assert skip["raised"] == ("", "")
        assert skip["unchanged"]
        assert skip["skipped"] == 1
        assert skip["steps"] == [1.0] * 7
        assert not skip["norm"].isfinite()


@pytest.mark.parametrize("place", [0, 4])
def test_every_rank_raises_and_says_where_it_is(world: int, ran_on: Backend, place: int) -> None:
    for number, rank in enumerate(found(world, ran_on, "nan_on_one_rank")):
        refused = rank[f"raise {place}"]
        kind, text = refused["raised"]
        assert kind == "NonfiniteGradientError"
        here = f"param_groups[{place // FIRST_GROUP}]['params'][{place % FIRST_GROUP}] (1)"
        assert (here if number == 1 else "gradients of other ranks") in text
        assert refused["unchanged"]
        assert refused["steps"] == [1.0] * 7


@pytest.mark.parametrize("place", [0, 4])
def test_zero_and_propagate_are_one_decision(world: int, ran_on: Backend, place: int) -> None:
    ranks = found(world, ran_on, "nan_on_one_rank")
    for rank in ranks:
        zero = rank[f"zero {place}"]
        assert zero["finite"] and not zero["unchanged"]
        assert zero["norm"].isfinite()
        assert zero["norm"] == ranks[0][f"zero {place}"]["norm"]
        propagated = rank[f"propagate {place}"]
        assert not propagated["norm"].isfinite()
        if place == 0:  # a counted NaN makes all of them NaN, as in torch
            assert not any(bool(weight.isfinite().any()) for weight in propagated["weights"])


def test_the_zero_policy_takes_the_norm_of_what_is_finite(world: int, ran_on: Backend) -> None:
    params = whole_parameters(2)
    grad = params[0].grad
    assert grad is not None
    rows = (
        2 if world == 4 else 3
    )  # of a rank, so that the second one's last element is that of the whole's
    grad.view(-1)[min(2 * rows, 5) * 3 - 1] = 0
    exact = nn.utils.get_total_norm(grads_of(params))
    for rank in found(world, ran_on, "nan_on_one_rank"):
        assert_close(rank["zero 0"]["norm"], exact)


def test_what_a_scaler_found_on_one_rank_holds_for_all(world: int, ran_on: Backend) -> None:
    for rank in found(world, ran_on, "infinity_found_on_one_rank"):
        assert rank["unchanged"]
        assert rank["skipped"] == 1
        assert rank["steps"] == [1.0] * 7


def test_ranks_without_gradients_take_part(world: int, ran_on: Backend) -> None:
    ranks = found(world, ran_on, "ranks_without_gradients")
    for rank in ranks:
        assert rank[str(world)]["norm"] == rank[str(world)]["function"] == 0
        assert rank["1"]["norm"] == ranks[0]["1"]["norm"] > 0
    assert [any(rank["1"]["grads"]) for rank in ranks] == [r != 1 for r in range(world)]
    # Elements that only the absent rank holds are missing; replicas that other ranks hold are not.
    if world == 2:
        squares = sum(
            float(grad.double().square().sum())
            for grad in ranks[0]["1"]["counted"]
            if grad is not None
        )
        for rank in ranks:
            assert_close(rank["1"]["norm"], squares**0.5)
            assert_close(rank["1"]["function"], rank["1"]["norm"])


@pytest.mark.parametrize("p", NORMS, ids="{:g}".format)
def test_norms_and_clips_of_lists(world: int, ran_on: Backend, p: float) -> None:
    ranks = found(world, ran_on, "functions")
    params = whole_parameters()
    norm = sg.clip_grad_norm_(params, 0.5, p)  # torch counts tensors for p = 0
    if p > 0:
        torch_params = whole_parameters()
        assert_close(norm, nn.utils.clip_grad_norm_(torch_params, 0.5, p))
        assert_close(grads_of(params), grads_of(torch_params))
    later = sg.get_total_norm(whole_grads(1), p)
    for rank in ranks:
        assert type(rank[f"clip {p:g}"]) is Tensor
        assert rank[f"clip {p:g}"] == ranks[0][f"clip {p:g}"]
        assert_close(rank[f"clip {p:g}"], norm)
        assert_close(rank[f"clipped {p:g}"], grads_of(params))
        assert_close(rank[f"norm {p:g}"], later)


def test_torch_refuses_what_is_mixed(world: int, ran_on: Backend) -> None:
    for rank in found(world, ran_on, "functions"):
        assert rank["mixed"][0] == "RuntimeError"
        assert "got mixed torch.Tensor and DTensor" in rank["mixed"][1]
        assert rank["collectives"] == 2  # one of ours for each call


def test_functions_on_elements(world: int, ran_on: Backend) -> None:
    ranks = found(world, ran_on, "functions")
    params = whole_parameters()
    nn.utils.clip_grads_with_norm_(params, 1.0, torch.tensor(4.0))
    with_norm = [grad.clone() for grad in grads_of(params)]
    first = torch.linalg.vector_norm(with_norm[0])
    nn.utils.clip_grads_with_norm_(params, 1e-3, first)
    with_dtensor = grads_of(params)
    params = whole_parameters()
    nn.utils.clip_grad_value_(params, 0.25)
    value = grads_of(params)
    params = whole_parameters()
    penalty = sum(0.1 * p.abs().sum() + 0.1 * p.square().sum() for p in params)
    assert isinstance(penalty, Tensor)
    penalty.backward()
    for rank in ranks:
        assert_close(rank["with norm"], with_norm)
        assert_close(rank["with dtensor"], with_dtensor)
        assert_close(rank["value"], value)
        assert all(rank["versions"])
        assert_close(rank["penalty"].float(), penalty.detach())
        assert rank["penalty"].dtype == torch.float64
        assert rank["penalty"] == ranks[0]["penalty"]
        assert_close(rank["penalised"], grads_of(params))
        shrunk = [nn.functional.softshrink(p.detach(), 0.3) for p in params]
        assert_close(rank["thresholded"], shrunk)


def test_error_if_nonfinite_raises_on_all_ranks(world: int, ran_on: Backend) -> None:
    for rank in found(world, ran_on, "functions"):
        assert rank["refused"][0] == "RuntimeError"
        assert (
            "clip_grad_norm_: error_if_nonfinite: expected finite gradients" in rank["refused"][1]
        )
        assert rank["unchanged"]


def test_penalties_and_proximal_steps_on_shards(world: int, ran_on: Backend) -> None:
    ranks = found(world, ran_on, "options_of_a_step")
    params, in_place = whole_parameters(), whole_parameters()
    options: dict[str, Any] = {"l1": 0.05, "l2": 0.1, "clip_value": 0.3, "l1_mode": "proximal"}
    optimizer = sg.optim.SGD(
        params, lr=0.1, max_norm=5.0, penalty_order="after_clip", write_grads=True, **options
    )
    adadelta = unfused.Adadelta(in_place, lr=1.0)
    wrapped = sg.Stabilizer(adadelta, max_norm=5.0, l1=0.05, l1_mode="proximal")
    for step in range(3):
        for trained, stepped in ((params, optimizer), (in_place, wrapped)):
            for param, grad in zip(trained, whole_grads(step), strict=True):
                param.grad = grad
            stepped.step()
    for rank in ranks:
        assert_close(rank["weights"], [p.detach() for p in params])
        assert_close(rank["grads"], grads_of(params))
        assert_close(rank["in place"], [p.detach() for p in in_place])
        assert rank["path"].startswith("in-place")
    assert_same_everywhere(ranks, "weights")


@pytest.mark.parametrize(
    ("scope", "p"), [("global", 2.0), ("group", 2.0), ("global", 3.0), ("group", torch.inf)]
)
def test_parameters_that_differ_from_rank_to_rank(
    world: int, ran_on: Backend, scope: str, p: float
) -> None:
    ranks = [rank[f"{scope} {p:g}"] for rank in found(world, ran_on, "pipeline_and_experts")]
    whole = [ranks[0]["grads"][0], *(g for rank in ranks for g in rank["grads"][1:])]
    exact = float(nn.utils.get_total_norm(whole, p))
    for rank in ranks:
        assert_close(rank["norm"], exact)
        assert rank["norm"] == ranks[0]["norm"]
        assert rank["collectives"] == 1
        assert rank["skipped"] == 1
        assert rank["unchanged"]
        assert torch.equal(rank["moved"][0], ranks[0]["moved"][0])
    moved = [ranks[0]["moved"][0], *(m for rank in ranks for m in rank["moved"][1:])]
    for part in [slice(None)] if scope == "global" else [slice(1), slice(1, None)]:
        # The learning rate is 1, so parameters move by the clipped gradients.
        scale = 0.5 / (float(nn.utils.get_total_norm(whole[part], p)) + 1e-6)
        assert_close(moved[part], [scale * grad for grad in whole[part]])


def test_a_sharded_pipeline() -> None:
    for ran_on in BACKENDS[:2]:
        if ran_on.why_not() is not None:
            continue
        ranks = found(4, ran_on, "stages_of_shards")
        exact = nn.utils.get_total_norm([ranks[0]["grad"], ranks[2]["grad"]])
        for rank in ranks:
            assert_close(rank["norm"], float(exact))
            assert rank["norm"] == ranks[0]["norm"]
            assert rank["collectives"] == 2
            assert rank["skipped"] == 1


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("scope", "p"), [("global", 2.0), ("group", 2.0), ("global", 3.0), ("group", torch.inf)]
)
def test_groups_inside_each_other(scope: str, p: float, reverse: bool) -> None:
    for ran_on in BACKENDS[:2]:
        if ran_on.why_not() is not None:
            continue
        ranks = [r[f"{scope} {p:g} {reverse}"] for r in found(4, ran_on, "experts_of_stages")]
        stages, experts = [ranks[r]["grads"][0] for r in (0, 2)], [r["grads"][1] for r in ranks]
        whole = nn.utils.get_total_norm(stages + experts, p)
        norms = [nn.utils.get_total_norm(part, p) for part in (stages, experts)]
        for rank in ranks:
            assert_close(rank["norm"], float(whole))
            for moved, grad, own in zip(rank["moved"], rank["grads"], norms, strict=True):
                limited = whole if scope == "global" else own
                assert_close([moved], [0.5 / (float(limited) + 1e-6) * grad])


def test_meshes_without_a_common_rank() -> None:
    for ran_on in BACKENDS[:2]:
        if ran_on.why_not() is not None:
            continue
        ranks = found(4, ran_on, "meshes_beside_each_other")
        for rank in ranks:
            assert_close(rank["norm"], float(nn.utils.get_total_norm(rank["grads"])))
            assert rank["norm"] == ranks[0]["norm"]
            assert rank["skipped"] == 1


def test_reduce_norm(world: int, ran_on: Backend) -> None:
    for rank in found(world, ran_on, "norms_of_ranks"):
        numbers = torch.arange(world, dtype=torch.float64)
        for p in (1.0, 2.0, 3.0, torch.inf):
            assert_close(rank[f"{p:g}"], torch.linalg.vector_norm(numbers, p))
        assert rank["float32"].dtype == torch.float32
        assert rank["float32"].isinf() or world == 1  # the norm exceeds fp32
        assert_close(rank["huge"], torch.tensor(1e300 * world ** (1 / 7), dtype=torch.float64))
        assert float(rank["tiny"]) == pytest.approx(1e-300 * world ** (1 / 7))
        assert rank["zero"] == 0
        assert rank["nan"].isnan()
        assert rank["infinite"] == torch.inf
        assert [kind for kind, _ in rank["refused"]] == ["TypeError", "ValueError", "TypeError"]


def test_meshes_may_overlap_on_part_of_the_ranks(ran_on: Backend) -> None:
    for rank in found(4, ran_on, "meshes_that_overlap")[:3]:
        assert_close(rank["norm"], 4.0)
        for weight in rank["weights"]:
            assert_close(weight, torch.full_like(weight, 0.5))


def test_all_ranks_count_a_clip(world: int, ran_on: Backend) -> None:
    for rank in found(world, ran_on, "clips_of_empty_parts"):
        assert rank == {scope: [1, 2] for scope in ("global", "group", "tensor")}


def test_state_goes_to_torch_and_back(world: int, ran_on: Backend) -> None:
    for rank in found(world, ran_on, "checkpoint_into_torch"):
        assert rank["path"] == "fused"
        assert_close(rank["ours"], rank["torch"])


def test_exchanged_parameters_are_noticed(world: int, ran_on: Backend) -> None:
    for rank in found(world, ran_on, "exchanged_shards"):
        assert bool((rank["old"] == 0).all())  # the step before subtracted 1
        assert bool((rank["new"] == 4).all())
        assert bool((rank["fresh"] == 0).all())
        assert_close(rank["norm"], 8**0.5)


def test_distributed_data_parallel_needs_nothing(world: int, ran_on: Backend) -> None:
    ranks = found(world, ran_on, "data_parallel")
    for rank in ranks:
        assert rank["norm"] == ranks[0]["norm"] > 0
        assert torch.equal(rank["weight"], ranks[0]["weight"])
        assert rank["in step"] == 0
