"""Declare an experiment of your own; run it with python -m study examples/study/spirals.py."""

import math

import torch

import steadygrad as sg
import study


def spirals() -> study.Task:
    """Return the task of telling two spirals apart: 1,200 points, every fourth held out."""
    turn = torch.linspace(0.5, 3 * math.pi, 600)
    arm = torch.stack([turn.cos(), turn.sin()], 1) * turn[:, None] / 5
    points, labels = torch.cat([arm, -arm]), torch.arange(2).repeat_interleave(600)
    test = torch.arange(1200) % 4 == 0
    parts = (points[~test], labels[~test], points[test], labels[test])
    return study.Classification(study.Dataset("two spirals", *parts, classes=2))


PROBLEM = study.Problem(
    name="spirals",
    title="10-layer tanh MLP, initialised twice as large as it should be",
    task=spirals,
    model=study.Mlp(layers=10, width=32, activation="tanh", init_gain=2.0),
    steps=400,
    batch_size=32,
)
ARMS = (
    study.Arm("none"),
    study.Arm("clip .5", "clipping", max_norm=0.5),
    study.Arm("z-score", "adaptive clipping", clip=sg.ClipZScore()),
    study.Arm("He init", "initialisation", model={"init_gain": 1.0}),
)
EXPERIMENT = study.Experiment("spirals", "Two spirals", "", (PROBLEM,), ARMS, (0.03, 0.3))
