"""Declare the remedies that experiments choose from, one line each."""

from __future__ import annotations

import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

import steadygrad as sg

from .arms import Arm
from .tasks import raw_pixels, shifted_images


def warmup(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Raise the learning rate from a hundredth to its full value over a tenth of the steps."""
    return lr_scheduler.LinearLR(optimizer, 0.01, total_iters=max(1, steps // 10))


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Lower the learning rate along a cosine to 0 over all steps."""
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)


def step_decay(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Divide the learning rate by 10 after half of the steps, and again after three quarters."""
    return lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4])


def plateau(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Halve the learning rate whenever the training loss has not fallen between two evaluations."""
    return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


def backoff(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Halve the learning rate after a skipped step, and let it recover."""
    return sg.LRBackoff(optimizer)


NONE = Arm("none", "none", "SGD as it is")
CLIP = Arm("clip 1", "clipping", "norm limited to 1", max_norm=1.0)
CLIP_5 = Arm("clip 5", "clipping", "norm limited to 5", max_norm=5.0)
CLIP_QUARTER = Arm("clip .25", "clipping", "norm limited to .25", max_norm=0.25)
CLIP_TENTH = Arm("clip .1", "clipping", "norm limited to .1", max_norm=0.1)
CLIP_VALUE = Arm("clip value", "clipping", "elements limited to .1", clip_value=0.1)
DAMP = Arm("Damp", "clipping", "a norm N > 1 becomes its root", clip=sg.Damp(1.0))
PERCENTILE = Arm(
    "ClipPercentile", "adaptive clipping", "AutoClip at its defaults", clip=sg.ClipPercentile()
)
Z_SCORE = Arm("ClipZScore", "adaptive clipping", "ZClip without its cap", clip=sg.ClipZScore())
Z_SCORE_CAPPED = Arm(
    "ClipZScore capped",
    "adaptive clipping",
    "ZClip at its defaults: never above 1",
    clip=sg.ClipZScore(max_norm=1.0),
)
RELATIVE = Arm("ClipRelative", "adaptive clipping", "AdaGC at its defaults", clip=sg.ClipRelative())
RELATIVE_UNCAPPED = Arm(
    "ClipRelative uncapped",
    "adaptive clipping",
    "AdaGC whose warm-up limits nothing",
    clip=sg.ClipRelative(max_norm=None),
)
ADAPTIVE = Arm("ClipAdaptive", "adaptive clipping", "AGC at its defaults", clip=sg.ClipAdaptive())
CLIP_SKIP = Arm(
    "clip 1 + SkipSpikes",
    "combination",
    "norm limited to 1, spikes left out",
    max_norm=1.0,
    skip=sg.SkipSpikes(),
)
SKIP = Arm("SkipSpikes", "skipping", "spikes left out", skip=sg.SkipSpikes())
L1 = Arm("L1", "penalty", "1e-4 sum |p|", l1=1e-4)
L2 = Arm("L2", "penalty", "1e-2 sum p^2 / 2", l2=1e-2)
WEIGHT_DECAY = Arm("weight decay", "weight decay", "of SGD, 1e-2", weight_decay=1e-2)
ACTIVATION_L1 = Arm(
    "activation L1", "activation penalty", "1e-4 sum |a|", model={"activation_l1": 1e-4}
)
ACTIVATION_L2 = Arm(
    "activation L2", "activation penalty", "1e-3 sum a^2 / 2", model={"activation_l2": 1e-3}
)
BATCH_NORM = Arm("batch norm", "batch norm", "before each ReLU", model={"norm": "steadygrad"})
DROPOUT = Arm("dropout", "dropout", "a tenth of the units", model={"dropout": 0.1})
HE = Arm("He init", "initialisation", "weights of the right size", model={"init_gain": 1.0})
XAVIER = Arm(
    "Xavier init", "initialisation", "Glorot and Bengio", model={"init": "xavier", "init_gain": 1.0}
)
ORTHOGONAL = Arm(
    "orthogonal init",
    "initialisation",
    "Saxe et al.",
    model={"init": "orthogonal", "init_gain": 1.0},
)
TORCH_INIT = Arm("torch's init", "initialisation", "what torch draws", model={"init": "torch"})
LEAKY = Arm("leaky ReLU", "activation", "slope .01 below 0", model={"activation": "leaky relu"})
ELU = Arm("ELU", "activation", model={"activation": "elu"})
TANH = Arm("tanh", "activation", "bounded", model={"activation": "tanh"})
WARMUP = Arm("warmup", "schedule", "a tenth of the steps", schedule=warmup)
COSINE = Arm("cosine", "schedule", "down to 0", schedule=cosine)
STEP_DECAY = Arm("step decay", "schedule", "to 1/10 and 1/100", schedule=step_decay)
PLATEAU = Arm(
    "ReduceLROnPlateau", "dynamic adjustment", "half where the loss does not fall", schedule=plateau
)
BACKOFF = Arm(
    "SkipSpikes + LRBackoff",
    "dynamic adjustment",
    "spikes left out, then half the rate for a while",
    skip=sg.SkipSpikes(),
    schedule=backoff,
)
ACCUMULATE = Arm("accumulate 4", "accumulation", "4 micro-batches a step", accumulate=4)
RAW = Arm("raw pixels", "raw data", "0 to 255, not normalised", task=raw_pixels)
AUGMENT = Arm("shifted images", "data", "by up to 2 pixels", task=shifted_images)
EARLY = Arm("early stopping", "early stopping", "2 looks without progress", early_stopping=2)
CLIP_L2 = Arm("clip 1 + L2", "combination", "both", max_norm=1.0, l2=1e-2)
CLIP_WARMUP = Arm("clip 1 + warmup", "combination", "both", max_norm=1.0, schedule=warmup)
CLIP_NORM = Arm(
    "clip 1 + batch norm", "combination", "both", max_norm=1.0, model={"norm": "steadygrad"}
)
CLIP_HE = Arm("clip 1 + He init", "combination", "both", max_norm=1.0, model={"init_gain": 1.0})

# The twins use torch's own functions, to compare results and times.
NONE_TORCH = NONE.by_torch()
CLIP_TORCH = CLIP.by_torch(about="clip_grad_norm_")
CLIP_VALUE_TORCH = CLIP_VALUE.by_torch(about="clip_grad_value_")
L1_TORCH = L1.by_torch(about="in the loss")
L2_TORCH = L2.by_torch(about="in the loss")
CLIP_L2_TORCH = CLIP_L2.by_torch(about="clip_grad_norm_, L2 in the loss")
BATCH_NORM_TORCH = BATCH_NORM.by_torch(about="torch.nn.BatchNorm", model={"norm": "torch"})
ACTIVATION_L1_TORCH = ACTIVATION_L1.by_torch(
    about="in the loss", model={"activation_l1": 1e-4, "activation_by": "torch"}
)
ACTIVATION_L2_TORCH = ACTIVATION_L2.by_torch(
    about="in the loss", model={"activation_l2": 1e-3, "activation_by": "torch"}
)
ACCUMULATE_TORCH = ACCUMULATE.by_torch(about="backward of loss / 4, four times")

_BY_NAME = {arm.name: arm for arm in list(globals().values()) if isinstance(arm, Arm)}


def named(names: str) -> tuple[Arm, ...]:
    """Return the arms whose names are given, separated by commas."""
    return tuple(_BY_NAME[name.strip()] for name in names.split(","))
