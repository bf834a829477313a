"""Tests a run of the study: what it does, what it measures, what counts as an explosion."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import study
from study import Arm, Classification, Mlp, Problem, Run, RunKey
from study import remedies as r
from study.explosion import first_explosion
from study.models import Recurrent
from study.sequences import NextCharacter
from study.training import thin
from tests.study.runs import blobs, tiny
from tests.study.runs import one_thread as one_thread
from tests.tolerances import assert_close

TASK = Classification(blobs())


def made(arm: Arm, learning_rate: float = 1e-3, seed: int = 0, **problem: object) -> Run:
    """Train one arm on the blobs."""
    base = tiny().problems[0]
    changed = dataclasses.replace(base, **problem)  # type: ignore[arg-type]
    experiment = tiny(
        problems=(changed,), arms=(dataclasses.replace(arm, twin=None),), learning_rates=(1e-3,)
    )
    return study.train(experiment, RunKey("blobs", arm.name, learning_rate, seed), TASK)


def without_time(run: Run) -> Run:
    return dataclasses.replace(run, seconds_per_step=0.0)


def test_a_seed_fixes_a_run() -> None:
    for arm in (r.CLIP, r.DROPOUT, r.AUGMENT, r.EARLY, r.ACCUMULATE):
        torch.manual_seed(1)
        first = without_time(made(arm))
        torch.manual_seed(2)
        assert without_time(made(arm)) == first
        assert made(arm, seed=1).curve != first.curve


def test_a_run_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    made(r.DROPOUT)
    assert torch.equal(torch.rand(3), expected)


def test_arms_differ_by_their_remedy_alone() -> None:
    starts = {
        arm.name: made(arm).start_loss for arm in (r.NONE, r.CLIP, r.L1, r.WARMUP, r.ACCUMULATE)
    }
    assert len(set(starts.values())) == 1
    assert made(r.HE).start_loss < starts["none"]


def test_without_a_remedy_it_is_plain_torch() -> None:
    run = made(r.NONE, 1e-4, 3)
    generator = torch.Generator().manual_seed(3)
    problem = tiny().problems[0]
    model = problem.model.build(16, 4, generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=problem.momentum)
    data = blobs()
    order = torch.randperm(200, generator=generator)
    losses, norms = [], []
    for batch in order.split(problem.batch_size)[: problem.steps]:
        optimizer.zero_grad()
        outputs = model(data.train_inputs[batch])
        loss = torch.nn.functional.cross_entropy(outputs, data.train_labels[batch])
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
        optimizer.step()
        losses.append(loss.item())
    assert run.curve is not None
    assert_close(run.first_losses, losses[:5], torch.float32)
    assert run.max_grad_norm == pytest.approx(max(norms), rel=1e-5)
    assert run.median_grad_norm == pytest.approx(float(np.median(norms)), rel=1e-5)


TWINS = [
    (r.NONE, r.NONE_TORCH),
    (r.CLIP, r.CLIP_TORCH),
    (r.CLIP_VALUE, r.CLIP_VALUE_TORCH),
    (r.L1, r.L1_TORCH),
    (r.L2, r.L2_TORCH),
    (r.CLIP_L2, r.CLIP_L2_TORCH),
    (r.BATCH_NORM, r.BATCH_NORM_TORCH),
    (r.ACTIVATION_L1, r.ACTIVATION_L1_TORCH),
    (r.ACTIVATION_L2, r.ACTIVATION_L2_TORCH),
    (r.ACCUMULATE, r.ACCUMULATE_TORCH),
]


@pytest.mark.parametrize(("ours", "theirs"), TWINS, ids=lambda arm: arm.name)
def test_torch_s_equivalent_does_the_same(ours: Arm, theirs: Arm) -> None:
    model = Mlp(layers=4, width=12, init_gain=1.0, batch_size=16)
    one, other = made(ours, 1e-2, model=model), made(theirs, 1e-2, model=model)
    assert theirs.twin == ours.name
    np.testing.assert_allclose(one.first_losses, other.first_losses, rtol=2e-4)
    # Norms of arms with penalties differ, since penalties are in the step for us and in torch's loss.
    assert (one.clipped_steps, one.metric) == (other.clipped_steps, other.metric)
    assert one.median_grad_norm == pytest.approx(other.median_grad_norm, rel=1e-3)


EVERY_ARM = [value for value in vars(r).values() if isinstance(value, Arm)]


@pytest.mark.parametrize("arm", EVERY_ARM, ids=lambda arm: arm.name)
def test_every_remedy_trains(arm: Arm) -> None:
    model = Mlp(layers=3, width=8, init_gain=1.0, batch_size=16)
    run = made(arm, 1e-2 / 255 if arm is r.RAW else 1e-2, model=model)
    assert run.steps == 12 or arm is r.EARLY
    assert math.isfinite(run.final_loss)
    assert run.memory_bytes > 4 * 2 * (16 * 8 + 8 * 8 + 8 * 4)
    assert run.exploded_step is None


def test_names_of_remedies_are_unlike() -> None:
    assert len({arm.name for arm in EVERY_ARM}) == len(EVERY_ARM) > 40


def test_an_explosion_is_seen_and_ends_the_run() -> None:
    run = made(r.NONE, 0.5, steps=50)
    assert run.nonfinite_step is not None and run.exploded_step is not None
    assert run.exploded_step <= run.nonfinite_step <= run.steps < 50
    assert run.exploded_parameter in dict(
        tiny().problems[0].model.build(16, 4, torch.Generator()).named_parameters()
    )
    assert run.metric is None
    assert not run.survived


def test_clipping_is_counted() -> None:
    run = made(r.CLIP)
    assert run.clipped_steps == run.steps == 12
    assert run.max_grad_norm > 1.0
    assert made(r.NONE).clipped_steps == 0


@pytest.mark.parametrize("arm", [r.CLIP_VALUE, r.CLIP_VALUE_TORCH], ids=lambda arm: arm.name)
def test_clipping_of_values_is_counted(arm: Arm) -> None:
    limits = [made(dataclasses.replace(arm, clip_value=limit)) for limit in (1e-6, 800.0, 1e6)]
    often, some, never = (run.clipped_steps for run in limits)
    assert often == 12 > some > never == 0


def test_early_stopping_returns_to_the_best() -> None:
    late = made(r.NONE, 0.05, steps=60)
    early = made(r.EARLY, 0.05, steps=60)
    assert early.survived and early.final_loss < early.start_loss
    assert early.steps < 60 or early.final_loss <= late.final_loss


def test_a_saturating_network_explodes_without_nan() -> None:
    """Check the case of Pascanu et al., whose loss jumps and stays finite."""
    text = "".join("abcdefghij"[(i * i) % 10] for i in range(4000))
    task = NextCharacter(text, length=16)
    problem = Problem(
        "text", "text", lambda: task, Recurrent(16, embedding=8, every_step=True), 60, 8
    )
    experiment = tiny(problems=(problem,), arms=(r.NONE, r.CLIP), learning_rates=(50.0,))
    run = study.train(experiment, RunKey("text", "none", 50.0, 0), task)
    assert run.nonfinite_step is None
    assert math.isfinite(run.final_loss)
    assert not run.survived
    assert run.exploded_step is not None


@pytest.mark.parametrize(
    ("losses", "norms", "final_loss", "step"),
    [
        ([1.0] * 20, [1.0] * 20, 1.0, None),
        ([1.0] * 19 + [math.nan], [1.0] * 20, math.nan, 20),
        ([1.0] * 20, [1.0] * 9 + [math.inf] + [1.0] * 10, 1.0, 10),
        ([1.0] * 20, [1.0] * 9 + [101.0] + [1.0] * 10, 1.0, 10),
        ([1.0] * 20, [1.0] * 9 + [99.0] + [1.0] * 10, 1.0, None),
        ([1.0] * 12 + [9.0] * 8, [1.0] * 20, 9.0, 13),
        ([1.0] * 20, [1.0] * 9 + [40.0] + [1.0] * 10, 3.0, 10),  # the network saturates
        ([2.0] * 20, [1.0] * 20, 2.1, None),  # the network learnt nothing
        ([1.0] * 20, [200.0, *[1.0] * 19], 1.0, None),  # the first step has no typical norm
        ([1.0] * 20, [1.0] * 2 + [1e8] * 18, 1.0, 3),  # an early explosion
        (
            [1.0] * 20,
            [1.0] * 3 + [50.0] * 4 + [2.5e3] * 8 + [1.2e4] * 5,
            1.0,
            16,
        ),  # a slow explosion
        ([1.0] * 20, [1.0] + [1e-9] * 9 + [1e-6] + [1e-9] * 9, 1.0, None),  # near a minimum
        ([1.0] * 20, [1.0] + [0.0] * 9 + [1e-30] + [0.0] * 9, 1.0, None),
        ([1.0] * 20, [0.0] * 9 + [5.0] * 11, 1.0, None),  # there is no norm to compare with
        ([1.0] * 20, [1.0] * 12 + [3.0] + [1.0] * 7, math.nan, 13),  # the final loss is NaN
    ],
)
def test_definition_of_an_explosion(
    losses: list[float], norms: list[float], final_loss: float, step: int | None
) -> None:
    parameters = np.stack([np.ones(20), np.asarray(norms)], axis=1)
    found = first_explosion(losses, norms, parameters, ["quiet", "loud"], 2.0, final_loss)
    assert (found and found.step) == step
    if found is not None and norms[found.step - 1] > 1.0:
        assert found.parameter == "loud"


def test_a_negative_loss_is_no_explosion() -> None:
    parameters = np.ones((20, 1))
    for losses, step in (([-1.0] * 20, None), ([-1.0] * 9 + [0.5] * 11, 10)):
        found = first_explosion(losses, [1.0] * 20, parameters, ["p"], -1.0, losses[-1])
        assert (found and found.step) == step


def test_where_all_is_nan_the_step_before_tells_the_parameter() -> None:
    parameters = np.ones((10, 3))
    parameters[8, 1] = 50.0
    parameters[9] = math.nan
    found = first_explosion(
        [1.0] * 9 + [math.nan], [1.0] * 10, parameters, list("abc"), 2.0, math.nan
    )
    assert found is not None and (found.step, found.parameter) == (10, "b")
    parameters[9, 0] = 1.0
    found = first_explosion(
        [1.0] * 9 + [math.nan], [1.0] * 10, parameters, list("abc"), 2.0, math.nan
    )
    assert found is not None and found.parameter == "c"  # backward reaches the last layer first


def test_a_gradient_that_was_zero_has_grown_most() -> None:
    parameters = np.ones((10, 2))
    parameters[:9, 1] = 0.0
    parameters[9] = 500.0
    found = first_explosion([1.0] * 10, [1.0] * 9 + [500.0], parameters, list("ab"), 2.0, 1.0)
    assert found is not None and (found.step, found.parameter) == (10, "b")


@pytest.mark.parametrize("steps", [1, 2, 3, 63, 64, 65, 1500])
def test_thinning_keeps_the_ends_and_the_extremes(steps: int) -> None:
    losses = [float(step) for step in range(steps)]
    norms = [1.0] * steps
    norms[steps // 2] = 99.0
    curve = thin(losses, norms)
    assert len(curve.step) == len(curve.loss) == len(curve.grad_norm) <= 64
    assert list(curve.step) == sorted(set(curve.step))
    assert (curve.step[0], curve.step[-1]) == (1, steps)
    assert (curve.loss[0], curve.loss[-1]) == (losses[0], losses[-1])
    assert max(curve.grad_norm) == 99.0
