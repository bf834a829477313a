"""Converts a model's batch norms to ours, in place, fuses them with what follows them, and converts them back."""

from __future__ import annotations

import copyreg
import functools
from types import new_class
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from steadygrad.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from steadygrad.nn.batch_norm import _BatchNorm as BatchNorm
from steadygrad.nn.fusion import MODULES, Steps, found, is_chain, norm_act, run_chain
from steadygrad.nn.known_blocks import known_forward, registered_steps, stands

Model = TypeVar("Model", bound=nn.Module)
Kind = type[nn.Module]

_KINDS: dict[Kind, Kind] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
# A derived class lives only as long as its instances; so does its key, which refers to its bases.
_DERIVED: WeakValueDictionary[tuple[Any, ...], Kind] = WeakValueDictionary()
_MARK = "_made_by_steadygrad"


class SynchronizedBatchNorm(BatchNorm):
    """The class that a ``torch.nn.SyncBatchNorm`` is converted to: it also takes input of 2 or more dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


def convert_batchnorm(
    model: Model, fuse: bool = True, process_group: dist.ProcessGroup | None = None
) -> Model:
    r"""Converts every batch norm of a model to one of `steadygrad.nn`, and fuses it with what follows it.

    Modules are changed in place and stay the same objects: parameters, buffers, hooks, attributes and names remain the
    same, so optimizers, checkpoints and references go on working. Only the class of a module changes, to a subclass of
    its old class; :func:`restore_batchnorm` changes it back.

    - ``torch.nn.BatchNorm1d/2d/3d`` become `BatchNorm1d`, `BatchNorm2d`, `BatchNorm3d`. A ``torch.nn.SyncBatchNorm``
      becomes a `SynchronizedBatchNorm`, over its own process group if none is given.
    - Subclasses with a ``forward`` of their own stay as they are, and so do lazy, parametrized and scripted ones.
      timm's ``BatchNormAct2d`` is known and is converted.
    - With ``fuse``, a batch norm, an addition and a ReLU or ReLU6 that follow each other are computed as one operation
      where the structure of the modules shows them. That is the case in every ``nn.Sequential``, also with an
      ``nn.Identity`` or an inactive dropout in between. It is also the case in blocks whose forward is known:
      torchvision's and timm's residual blocks, inverted residuals and ResNets, and blocks given to
      :func:`register_block`. Such a module becomes an instance of a subclass, for instance ``FusedBasicBlock`` for
      ``BasicBlock``, which differs only in how it computes. `conversion_report` says what was fused, what was not, and
      what to write then.

    The numbers are those of the unfused modules, up to rounding. The conversion runs no forward and guesses at none: a
    block whose source code differs from the known one is left alone. At every call a fused module uses its original
    forward if a member has hooks or a forward of its own, is None or of another class than expected, or if there are
    global module hooks.

    Args:
        model: Any module, also a batch norm itself.
        fuse: Whether to fuse; False converts the batch norms and nothing else. Default: True.
        process_group: The ranks that compute statistics together in training, ``torch.distributed.group.WORLD`` for
            all. With None each process computes its own. Default: None.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: A block lacks a member that the `Steps` given to :func:`register_block` name. Then nothing has
            changed.

    Source: Ioffe and Szegedy 2015; He et al. 2016 for the residual block.
    """
    _check_module("convert_batchnorm", model)
    if fuse:
        _check_steps(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not why_left(module, process_group):
            _convert(module, process_group)
    for module in model.modules() if fuse else ():
        if _is_to_fuse(module):
            _set_class(module, derived(type(module)))
    return model


def restore_batchnorm(model: Model) -> Model:
    """Converts a model back to torch's modules, in place: for export, quantization, folding and TorchScript.

    Parameters and buffers stay the same tensors, and fused blocks and chains get their old class back. `BatchNorm2d`
    becomes ``torch.nn.BatchNorm2d``, or ``torch.nn.SyncBatchNorm`` if it has a process group, and the others likewise.
    A user's own subclass becomes that class again, without a process group. A batch norm with an activation becomes an
    ``nn.Sequential`` of a batch norm and ``nn.ReLU`` or ``nn.ReLU6``. Its keys in the state dict then change from
    ``bn.weight`` to ``bn.0.weight``, and it no longer takes a residual.

    Args:
        model: Any module; torch's own modules stay as they are.

    Returns:
        ``model``, whose batch norms can be trained and converted again.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: A batch norm is parametrized, or its class is a user's subclass of ours. Then nothing has changed.
    """
    _check_module("restore_batchnorm", model)
    modules = list(model.named_modules())
    for name, module in modules:
        if isinstance(module, BatchNorm) and _torch_class(module) is None:
            raise ValueError(
                f"restore_batchnorm: {name or 'model'}: expected a class that convert_batchnorm makes, got "
                f"{type(module).__name__}: remove its parametrization first, or replace the module by one of torch.nn"
            )
    for _, module in modules:
        if isinstance(module, BatchNorm):
            _restore(module)
        else:
            _set_class(module, original_class(module))
    return model


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function}: model: expected a torch.nn.Module, got {type(model).__name__}"
        )


def _check_steps(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kind = original_class(module)
        steps = registered_steps(kind)
        absent = [] if steps is None else steps.absent(module)
        if absent:
            raise ValueError(
                f"convert_batchnorm: {name or 'model'}: expected the members that the Steps of {kind.__name__} name, "
                f"got a {kind.__name__} without {', '.join(map(repr, absent))}: correct the names (an "
                "addition is add=True) and call steadygrad.nn.register_block again; a member that only some blocks "
                "have is None in the others, and has a question mark in Steps"
            )


def why_left(module: nn.Module, process_group: dist.ProcessGroup | None = None) -> str:
    """Returns why a batch norm cannot be converted; empty if it can."""
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
        name
        for name in ("forward", "__call__")
        if getattr(kind, name) is not getattr(base, name) and not _is_norm_act(kind, name)
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
    _set_class(module, ours if kind is base else derived(kind, ours))
    converted: Any = module
    converted.activation = None
    converted.process_group = process_group


def _torch_class(norm: BatchNorm) -> Kind | None:
    """Returns the class, torch's or the user's, that a batch norm of ours goes back to; None if there is none."""
    kind = original_class(norm)
    if kind is not type(norm):
        return kind
    if kind is SynchronizedBatchNorm:
        return nn.SyncBatchNorm
    theirs = {ours: base for base, ours in _KINDS.items()}.get(kind)
    return nn.SyncBatchNorm if theirs is not None and norm.process_group is not None else theirs


def _restore(norm: BatchNorm) -> None:
    kind = _torch_class(norm)
    assert kind is not None
    state = vars(norm)
    shared, activation = state.pop("process_group", None), state.pop("activation", None)
    if issubclass(kind, nn.SyncBatchNorm):
        state["process_group"] = None if shared is None else shared.held
    if activation is None:
        return _set_class(norm, kind)
    inner = kind.__new__(kind)
    chain = nn.Sequential(inner, MODULES[activation]())
    vars(inner).update(state)
    for name, empty in vars(nn.Module()).items():
        if "hook" in name:  # these hooks saw the output of the activation
            vars(inner)[name], vars(chain)[name] = empty, state[name]
    chain.train(norm.training)
    state.clear()
    state.update(vars(chain))
    _set_class(norm, nn.Sequential)


def _set_class(module: nn.Module, kind: Kind) -> None:
    if type(module) is not kind:
        object.__setattr__(module, "__class__", kind)


def _is_norm_act(kind: Kind, method: str = "forward") -> bool:
    return known_forward(kind) == (method, norm_act)


def _is_to_fuse(module: nn.Module) -> bool:
    if original_class(module) is not type(module) or isinstance(module, _BatchNorm):
        return False
    if is_chain(module):
        return any(operation for _, operation, _ in found(module, None))
    _, forward = known_forward(type(module))
    if not isinstance(forward, Steps):
        return forward is not None
    return any(operation for _, operation, _ in found(module, forward))


def original_class(module: nn.Module) -> Kind:
    """Returns the class that a module had before it was derived from here."""
    kind: Kind = type(module)
    return kind.__mro__[1] if _MARK in vars(kind) else kind


def derived(kind: Kind, ours: Kind | None = None) -> Kind:
    """Returns the subclass of ``kind`` whose forward is fused or, given ``ours``, a class derived from both.

    If the forward is not known, as in a process that loads a file without registering the block, it returns ``kind``.
    """
    bases = (kind,) if ours is None else (kind, ours)
    forward: Any
    is_block = False
    if ours is not None:
        method, forward = "forward", ours.forward
        if kind.forward not in (nn.SyncBatchNorm.forward, _BatchNorm.forward):
            if not _is_norm_act(kind):
                return kind
            forward = norm_act
    elif kind.forward is nn.Sequential.forward:
        method, forward = "forward", run_chain
    else:
        method, forward = known_forward(kind)
        is_block = forward is not None
        if not is_block:
            return kind
    key = (*bases, forward)
    known_class = _DERIVED.get(key)
    if known_class is not None:
        return known_class

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced = super(made, self).__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_new, (kind, ours), *reduced[2:])
        return reduced

    members = {
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
        "__reduce_ex__": __reduce_ex__,
        _MARK: True,
        method: _stepping_aside(kind, method, forward) if is_block else forward,
    }
    name = kind.__name__ if ours is not None else f"Fused{kind.__name__}"
    made: Kind = new_class(name, bases, exec_body=lambda body: body.update(members))
    _DERIVED[key] = made
    return made


def _stepping_aside(kind: Kind, method: str, known: Any) -> Any:
    """Returns a method that runs the known forward where that does the same, and else the class's own."""
    original = getattr(kind, method)

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = getattr(kind, method)
        if own is original and stands(self, known, args, kwargs):
            return known(self, *args, **kwargs)
        return own(self, *args, **kwargs)

    return forward


def _new(kind: Kind, ours: Kind | None) -> nn.Module:
    made = derived(kind, ours)
    return made.__new__(made)
