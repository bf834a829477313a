"""A user's script for type checkers; ``make lint`` checks it, and nothing runs it.

Each ``type: ignore`` is a mistake that mypy has to find. If mypy does not find it, the comment is unused, which is an
error.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import steadygrad as sg


class Net(nn.Sequential):
    """A model with an attribute of its own."""

    width = 8


def makes_optimizers(model: Net) -> None:
    params = model.parameters()
    sg.optim.AdamW(params, 1e-3, (0.9, 0.95), max_norm=1.0, clip_scope="group", rounding="kahan")
    sg.optim.SGD(model.named_parameters(), lr=torch.tensor(0.1), momentum=0.9, skip=sg.SkipSpikes())
    sg.optim.Adagrad(sg.param_groups(model, l2=1e-4), clip=sg.ClipAdaptive(), telemetry="tensor")
    sg.optim.AdamW(params, maxnorm=1.0)  # type: ignore[call-arg]
    sg.optim.AdamW(params, lr="fast")  # type: ignore[arg-type]
    sg.optim.AdamW(params, momentum=0.9)  # type: ignore[call-arg]
    sg.optim.SGD(params, penalty_order="after")  # type: ignore[arg-type]
    sg.optim.Adam(params, max_norm="1")  # type: ignore[arg-type]
    sg.optim.Adagrad(params, clip=1.0)  # type: ignore[arg-type]
    sg.optim.RMSprop(params, telemetry="tensors")  # type: ignore[arg-type]
    sg.Stabilizer(torch.optim.AdamW(params), maxnorm=1.0)  # type: ignore[call-arg]
    sg.Stabilizer(model)  # type: ignore[arg-type]


def uses_a_wrapper(opt: sg.Stabilizer) -> None:
    assert_type(opt.max_norm, float | None)
    opt.max_norm = 0.5
    opt.clip_value = None
    opt.zero_grad(set_to_none=True)
    torch.optim.lr_scheduler.StepLR(opt, 10)
    assert_type(opt.l1, float)
    assert_type(opt.grad_norm, Tensor)
    assert_type(opt.optimizer, torch.optim.Optimizer)
    _ = opt.grad_nrom  # type: ignore[attr-defined]
    opt.maxnorm = 0.5  # type: ignore[attr-defined]
    opt.l2 = None  # type: ignore[assignment]


def uses_an_optimizer(opt: sg.optim.AdamW) -> None:
    opt.max_norm = None
    assert_type(opt.skipped_steps, int)
    _ = opt.grad_nrom  # type: ignore[attr-defined]
    opt.maxnorm = 0.5  # type: ignore[attr-defined]
    opt.l1 = "0.1"  # type: ignore[assignment]


def converts(model: Net) -> None:
    assert_type(sg.nn.convert_batchnorm(model), Net)
    sg.nn.BatchNorm2d(8, activation="relu")
    sg.nn.BatchNorm2d(8, activation="gelu")  # type: ignore[arg-type]
    sg.nn.functional.batch_norm(torch.ones(2, 3), None, None, activation="gelu")  # type: ignore[arg-type]
