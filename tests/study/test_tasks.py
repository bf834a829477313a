"""Tests the tasks and networks of the study."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

import study
from steadygrad import nn as stable_nn
from study import (
    Addition,
    Classification,
    Dataset,
    Mlp,
    NextCharacter,
    PlainCnn,
    Recurrent,
    TemporalOrder,
)
from study.data import split_indices
from study.sequences import python_help
from study.tasks import image_shape, raw_pixels, shifted_images
from tests.study.runs import blobs
from tests.study.runs import one_thread as one_thread


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return study.digits()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


# --- digits ---


@pytest.mark.parametrize(("classes", "learned"), [(2, 0.75), (4, 0.625), (5, 0.6), (10, 0.3)])
def test_what_has_learned_is_well_above_guessing(classes: int, learned: float) -> None:
    task = Classification(dataclasses.replace(blobs(), classes=classes))
    assert task.metric.guessing == 1 / classes
    assert task.metric.learned == pytest.approx(learned)


def test_digits_have_the_promised_shapes(digits: Dataset) -> None:
    assert digits.train_inputs.shape == (4000, 784)
    assert digits.test_inputs.shape == (1000, 784)
    assert digits.train_inputs.dtype == digits.test_inputs.dtype == torch.float32
    assert digits.train_labels.dtype == digits.test_labels.dtype == torch.int64
    assert torch.equal(digits.test_labels.bincount(), torch.full((10,), 100))
    assert torch.equal(digits.train_labels.bincount(), torch.full((10,), 400))
    assert digits.chance == 0.1


def test_digits_are_normalised_by_the_training_part_alone(digits: Dataset) -> None:
    assert abs(digits.train_inputs.mean().item()) < 1e-4
    assert abs(digits.train_inputs.std().item() - 1) < 1e-4
    assert digits.test_inputs.mean().item() != pytest.approx(0.0, abs=1e-4)


def test_no_test_image_is_among_the_training_images(digits: Dataset) -> None:
    train = {image.numpy().tobytes() for image in digits.train_inputs}
    assert not any(image.numpy().tobytes() in train for image in digits.test_inputs)


def test_split_is_disjoint_complete_and_fixed_by_its_seed() -> None:
    labels = torch.arange(60).remainder(3).numpy()
    train, test = split_indices(labels, 5, seed=1)
    assert sorted(train.tolist() + test.tolist()) == list(range(60))
    assert torch.equal(test, split_indices(labels, 5, seed=1)[1])
    assert not torch.equal(test, split_indices(labels, 5, seed=2)[1])


def test_raw_pixels_are_those_of_the_images(digits: Dataset) -> None:
    raw = raw_pixels(Classification(digits))
    assert isinstance(raw, Classification)
    inputs = raw.data.train_inputs
    assert (inputs.min().item(), inputs.max().item()) == pytest.approx((0.0, 255.0), abs=1e-3)
    assert (inputs - inputs.round()).abs().max().item() < 1e-3


def test_shifted_images_are_shifted_and_the_rest_stays(digits: Dataset) -> None:
    task = Classification(digits)
    moved = shifted_images(task)
    assert isinstance(moved, Classification)
    assert moved.data is task.data
    inputs, labels = next(moved.batches(64, generator()))
    original, same = next(task.batches(64, generator()))
    assert torch.equal(labels, same)
    images = original.view(-1, 28, 28)
    padded = torch.nn.functional.pad(images, [2] * 4, value=original.min().item())
    for image, wide in zip(inputs.view(-1, 28, 28), padded, strict=True):
        places = itertools.product(range(5), repeat=2)
        assert any(torch.equal(image, wide[y : y + 28, x : x + 28]) for y, x in places)
    assert not torch.equal(inputs, original)


def test_validation_data_are_taken_from_the_training_part() -> None:
    task = Classification(blobs())
    kept, held = task.hold_out(0)
    assert isinstance(kept, Classification) and isinstance(held, Classification)
    assert len(kept.data.train_labels) == 180
    assert len(held.data.train_labels) == 20
    rows = {row.numpy().tobytes() for row in kept.data.train_inputs}
    assert not any(row.numpy().tobytes() in rows for row in held.data.train_inputs)
    with pytest.raises(ValueError, match="early stopping: it has no validation data"):
        TemporalOrder(10).hold_out(0)


@pytest.mark.parametrize("task", [raw_pixels, shifted_images])
def test_changes_of_images_need_images(task: object) -> None:
    assert callable(task)
    with pytest.raises(ValueError, match="expected a Classification, got Addition"):
        task(Addition(10))


def test_shape_of_images() -> None:
    assert image_shape(784) == (1, 28, 28)
    assert image_shape(3072) == (3, 32, 32)
    with pytest.raises(ValueError, match=r"image_shape: features: .* got 785"):
        image_shape(785)


# --- sequences ---


@pytest.mark.parametrize("length", [10, 20, 30])
def test_temporal_order_is_that_of_the_two_marks(length: int) -> None:
    inputs, targets = next(TemporalOrder(length).batches(500, generator()))
    assert inputs.shape == (500, length, 6)
    assert torch.equal(inputs.sum(2), torch.ones(500, length))
    symbols = inputs.argmax(2)
    marked = symbols < 2
    assert torch.equal(marked.sum(1), torch.full((500,), 2))
    for row, target in zip(symbols, targets, strict=True):
        first, second = (place for place, symbol in enumerate(row) if symbol < 2)
        assert length / 10 <= first < 2 * length / 10
        assert 4 * length / 10 <= second < 5 * length / 10
        assert target == 2 * row[first] + row[second]
    assert torch.equal(targets.unique(), torch.arange(4))


def test_addition_is_half_the_sum_of_the_marked_numbers() -> None:
    inputs, targets = next(Addition(20).batches(500, generator()))
    numbers, marks = inputs.unbind(2)
    assert torch.equal(marks.sum(1), torch.full((500,), 2.0))
    assert torch.equal(marks[:, :2].sum(1), torch.ones(500))
    torch.testing.assert_close(targets, (numbers * marks).sum(1) / 2)


class _Oracle(torch.nn.Module):
    """Solves a task exactly, or guesses."""

    def __init__(self, task: TemporalOrder | Addition, guess: bool) -> None:
        super().__init__()
        self.task, self.guess = task, guess

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if isinstance(self.task, Addition):
            answer = inputs.prod(2).sum(1, keepdim=True) / 2
            return torch.full_like(answer, 0.5) if self.guess else answer
        symbols = inputs.argmax(2)
        first, second = symbols[symbols < 2].view(-1, 2).unbind(1)
        answer = torch.nn.functional.one_hot(2 * first + second, 4).float()
        return torch.ones_like(answer) if self.guess else answer


@pytest.mark.parametrize("task", [TemporalOrder(20), Addition(20)], ids=["order", "addition"])
def test_solved_and_guessed(task: TemporalOrder | Addition) -> None:
    assert task.measure(_Oracle(task, guess=False)) == 0.0
    error = task.measure(_Oracle(task, guess=True))
    assert error is not None
    assert error == pytest.approx(task.metric.guessing, abs=0.02)
    assert not task.metric.reached(error, task.metric.learned)
    assert task.metric.reached(0.0, task.metric.learned)


def test_next_character_reads_real_text() -> None:
    task = NextCharacter()
    assert len(python_help()) > 200_000
    inputs, targets = next(task.batches(8, generator()))
    assert inputs.shape == targets.shape == (8, 64)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert 4.0 < task.metric.guessing < 5.0

    class Guess(torch.nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*inputs.shape, task.outputs)

    assert task.measure(Guess()) == pytest.approx(math.log2(task.outputs), rel=1e-5)


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match=r"NextCharacter: text: expected more than .* got 50"):
        NextCharacter("ab" * 25)


# --- networks ---


def test_he_keeps_the_scale_and_a_gain_does_not() -> None:
    inputs = torch.randn(500, 200, generator=generator())
    for gain in (1.0, 1.5):
        model = Mlp(layers=10, width=200, init_gain=gain).build(200, 200, generator())
        growth = (model(inputs).std() / inputs.std()).item()
        assert 0.5 < growth / gain**10 < 2.0


def test_a_gain_scales_the_same_draws() -> None:
    small, large = (
        Mlp(layers=3, width=8, init_gain=gain).build(4, 2, generator()) for gain in (1.0, 1.5)
    )
    for one, other in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(1.5 * one, other)


@pytest.mark.parametrize("init", ["he", "xavier", "orthogonal", "torch"])
def test_initializations_come_from_the_generator(init: str) -> None:
    first, second = (
        Mlp(layers=3, width=8, init=init).build(4, 2, generator()).state_dict() for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_batch_norm_is_ours_or_torch_s() -> None:
    ours = PlainCnn(layers=4, channels=4, norm="steadygrad").build(64, 3, generator())
    theirs = PlainCnn(layers=4, channels=4, norm="torch").build(64, 3, generator())
    assert sum(isinstance(module, stable_nn.BatchNorm2d) for module in ours) == 3
    assert sum(type(module) is torch.nn.BatchNorm2d for module in theirs) == 3
    inputs = torch.randn(8, 64, generator=generator())
    torch.testing.assert_close(ours(inputs), theirs(inputs), rtol=1e-4, atol=1e-5)


def test_recurrent_networks() -> None:
    spec = Recurrent(hidden=7, embedding=3, every_step=True)
    assert spec.build(11, 5, generator())(torch.randint(0, 11, (2, 4))).shape == (2, 4, 5)
    last = Recurrent(hidden=7).build(11, 5, generator())
    assert last(torch.randn(2, 4, 11)).shape == (2, 5)


def test_recurrent_weights_have_the_size_that_was_asked_for() -> None:
    spec = Recurrent(hidden=200, recurrent_gain=1.2)
    weights = dict(spec.build(3, 2, generator()).named_parameters())
    largest = torch.linalg.eigvals(weights["recurrent.weight_hh_l0"]).abs().max().item()
    assert largest == pytest.approx(1.2, rel=0.15)
