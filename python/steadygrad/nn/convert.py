"""`convert_batchnorm`: a model's batch norms become ours, in place, and take on what follows them."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from steadygrad.nn import fused_modules
from steadygrad.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from steadygrad.nn.batch_norm import _BatchNorm as BatchNorm
from steadygrad.nn.derived_classes import derived_class

Model = TypeVar("Model", bound=nn.Module)

_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}


class SynchronizedBatchNorm(BatchNorm):
    """What a ``torch.nn.SyncBatchNorm`` becomes: takes input of 2 dimensions or more, as that does."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


def convert_batchnorm(
    model: Model, fuse: bool = True, process_group: dist.ProcessGroup | None = None
) -> Model:
    r"""Makes every batch norm of a model one of `steadygrad.nn`, and fuses what follows it.

    Modules are changed in place and stay the objects that they are: parameters, buffers, hooks, attributes and
    names are the very same, so that optimizers, checkpoints and references go on working. Only their class
    changes, to a subclass of what it was.

    - ``torch.nn.BatchNorm1d/2d/3d`` become `BatchNorm1d`, `BatchNorm2d`, `BatchNorm3d`. A ``torch.nn.SyncBatchNorm``
      becomes a `SynchronizedBatchNorm`, over its own process group if none is given.
    - Left as they are: subclasses with a ``forward`` of their own, lazy ones, parametrized and scripted ones.
    - With ``fuse`` a batch norm, an addition and a ReLU that follow each other are computed as one operation:
      in every ``nn.Sequential``, and in every module whose own ``forward`` `torch.fx` can trace. Such a module
      becomes an instance of a subclass, ``FusedBasicBlock`` for ``BasicBlock``, which differs in nothing but how it
      computes. `conversion_report` says what was fused and what was not.

    Numbers stay those of the unfused modules, up to rounding. The fused forward runs only where it stands for the
    original one; otherwise the original runs: when an attribute that steered the traced path has another value, when
    an optional argument is given, when a module has hooks or was replaced, when the operands of an
    addition are not of one shape and dtype. What a ``forward`` reads from global variables is taken to be constant.

    Args:
        model: any module, also a batch norm itself.
        fuse: whether to fuse; False changes the batch norms alone.
        process_group: the ranks whose statistics are taken together in training,
            ``torch.distributed.group.WORLD`` for all; None leaves each process its own.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.

    Source: Ioffe and Szegedy 2015; He et al. 2016 for the residual block.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"convert_batchnorm: model: expected a torch.nn.Module, got {type(model).__name__}"
        )
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not why_left(module, process_group):
            _convert(module, process_group)
    if fuse:
        for module in list(model.modules()):
            fused_modules.fuse(module)
    return model


def why_left(module: nn.Module, process_group: dist.ProcessGroup | None = None) -> str:
    """Why a batch norm stays as it is; empty if nothing speaks against its conversion."""
    kind = type(module)
    if isinstance(module, BatchNorm):
        return ""
    if isinstance(module, _LazyNormBase):
        return "lazy: it has no parameters yet; run a batch first"
    if nn.utils.parametrize.is_parametrized(module):
        return "parametrized"
    if "forward" in vars(module):
        return "its forward was replaced"
    base = _base(kind)
    if base is None:
        return f"{kind.__name__} is not a kind that is known"
    changed = [
        name for name in ("forward", "__call__") if getattr(kind, name) is not getattr(base, name)
    ]
    if changed:
        return f"{kind.__name__} has a {changed[0]} of its own"
    if base is nn.SyncBatchNorm and process_group is None and _own_group(module) is None:
        return "it has no process group, and torch.distributed is not initialized"
    return ""


def _base(kind: type[nn.Module]) -> type[nn.Module] | None:
    known = (*_KINDS, nn.SyncBatchNorm)
    return next((base for base in kind.__mro__ if base in known), None)


def _own_group(module: nn.Module) -> dist.ProcessGroup | None:
    group: dist.ProcessGroup | None = getattr(module, "process_group", None)
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    return group


def _convert(module: nn.Module, process_group: dist.ProcessGroup | None) -> None:
    if isinstance(module, BatchNorm):
        if process_group is not None:
            module.process_group = process_group
        return
    kind = type(module)
    base = _base(kind)
    assert base is not None
    ours = _KINDS.get(base, SynchronizedBatchNorm)
    if base is nn.SyncBatchNorm and process_group is None:
        process_group = _own_group(module)
    object.__setattr__(module, "__class__", ours if kind is base else _mixed(kind, ours))
    converted: Any = module
    converted.activation = None
    converted.process_group = process_group


def _mixed(kind: type[nn.Module], ours: type[nn.Module]) -> type[nn.Module]:
    """A class that is both: it has what a user's subclass adds, and our forward."""
    return derived_class(kind.__name__, (kind, ours), _our_forward, _mixed)


def _our_forward(kind: type[nn.Module], ours: type[nn.Module]) -> dict[str, object]:
    return {"forward": ours.forward}
