"""Fuses calls of a network's layers: a batch norm with the addition and the ReLU or ReLU6 that follow it.

Only what the modules show is fused. Nothing is run to find out, and every call looks at the modules as they are at that
time. The modules themselves do no more than before: the chain or the block that calls them does the fusing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.proxy import Proxy
from torch.nn.modules.module import _has_any_global_hook

from steadygrad.nn.batch_norm import _BatchNorm as BatchNorm
from steadygrad.reference.batch_norm import Activation

_CALL: Any = nn.Module.__call__
_SEQUENTIAL: Callable[..., Any] = nn.Sequential.forward
# The modules that do what our batch norms' activations do.
MODULES: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6}
_ACTIVATION = {kind: kind.forward for kind in MODULES.values()}
_DROPOUT = {k: k.forward for k in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)}
_IDENTITY = {nn.Identity: nn.Identity.forward}
# These modules change nothing but what they return, so a batch norm may also be called after them.
_STILL = {
    kind: kind.forward
    for dimensions in ("1d", "2d", "3d")
    for kind in (getattr(nn, f"{name}{dimensions}") for name in ("Conv", "AvgPool", "MaxPool"))
} | _IDENTITY
# A module, the modules after it that its call replaces, and what the last of these is: a batch norm, and everything up
# to its activation. Elsewhere these are empty and None.
Call = tuple[Any, list[Any], Activation | None]
# `Steps`, or a user's function, which takes the module and the arguments of its forward.
Forward = Callable[..., Any]


def any_global_hook() -> bool:
    """Returns whether there are hooks on the calls of all modules."""
    return bool(_has_any_global_hook())


def is_plain(module: Any) -> bool:
    """Returns whether calling a module does nothing but call its class's forward."""
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or module._compiled_call_impl is not None
        or type(module).__call__ is not _CALL
    )


def activation_of(module: Any) -> Activation | None:
    """Returns which activation of ours ``module`` is: a function, or a module whose call may be left out."""
    if _is_one_of(_ACTIVATION, module):
        if not is_plain(module):
            return None
        if type(module) is nn.ReLU:
            return "relu"
        return "relu6" if module.min_val == 0 and module.max_val == 6 else None
    if module is F.relu or module is torch.relu:
        return "relu"
    return "relu6" if module is F.relu6 else None


def operation(activation: Activation | None, adds: bool = False) -> str:
    """Returns the name of what is computed at once with a batch norm; empty if that is nothing."""
    parts = ["add"] * adds + ([] if activation is None else [MODULES[activation].__name__])
    return " + ".join(["batch norm", *parts]) if parts else ""


def is_passed(module: Any) -> bool:
    """Returns whether ``module`` would return its input: an identity, or an inactive dropout."""
    if _is_one_of(_IDENTITY, module):
        return is_plain(module)
    inactive = _is_one_of(_DROPOUT, module) and (not module.training or module.p == 0)
    return inactive and is_plain(module)


def is_norm(module: Any) -> bool:
    """Returns whether ``module`` is one of our batch norms and may be fused with what follows it."""
    return (
        isinstance(module, BatchNorm)
        and module.activation is None
        and is_plain(module)
        and (type(module).forward is BatchNorm.forward or is_passed(act_of(module)))
    )


def is_chain(module: Any) -> bool:
    """Returns whether ``module`` calls its children one after the other and does nothing else."""
    forward = getattr(type(module), "forward", None)
    return forward is nn.Sequential.forward or forward is run_chain


def _is_one_of(kinds: dict[Any, Any], module: Any) -> bool:
    kind = type(module)
    return kind in kinds and kinds[kind] is kind.forward


def leaves(modules: Iterable[Any]) -> list[Any]:
    """Returns the modules, with every chain replaced by its children."""
    found: list[Any] = []
    for module in modules:
        if is_chain(module) and is_plain(module):
            found += leaves(module._modules.values())
        else:
            found.append(module)
    return found


def planned(modules: Iterable[Any]) -> Iterator[Call]:
    """Yields calls that replace calling the modules one after the other; looks at each module when it is its turn."""
    rest = leaves(modules)
    at = 0
    while at < len(rest):
        end = at + 1
        activation = None
        if is_norm(rest[at]):
            while end < len(rest) and is_passed(rest[end]):
                end += 1
            activation = activation_of(rest[end]) if end < len(rest) else None
            end = at + 1 if activation is None else end + 1
        yield rest[at], rest[at + 1 : end], activation
        at = end


def run(calls: Iterable[Call], input: Any) -> Any:
    """Carries out planned calls."""
    for module, taken, activation in calls:
        if activation is not None and isinstance(input, Tensor):
            input = BatchNorm.forward(module, input, None, activation)
        else:
            input = module(input)
            for after in taken:
                input = after(input)
    return input


def run_chain(self: Any, input: Any) -> Any:
    """Runs an ``nn.Sequential``, calling each batch norm together with what it is fused with; used as its forward."""
    if any_global_hook():
        return _SEQUENTIAL(self, input)
    return run(planned(self._modules.values()), input)


def norm_act(self: Any, x: Any) -> Any:
    """Runs timm's ``BatchNormAct2d``: batch norm, ``drop`` and ``act``; used as its forward."""
    if isinstance(x, Proxy):
        return self._record(x, None)
    activation = activation_of(act_of(self))
    if activation is not None and not any_global_hook():
        return BatchNorm.forward(self, x, None, activation)
    return self.act(self.drop(BatchNorm.forward(self, x)))


def act_of(module: Any) -> Any:
    """Returns what timm's ``BatchNormAct2d`` calls after its batch norm; None for another module."""
    if type(module).forward is norm_act and is_passed(module._modules.get("drop")):
        return module._modules.get("act")
    return None


def batch_norm_add_relu(
    norm: Callable[[Tensor], Tensor],
    input: Tensor,
    residual: Tensor | None = None,
    relu: Callable[[Tensor], Tensor] | None = None,
    *,
    in_place: bool = False,
) -> Tensor:
    """Computes ``relu(norm(input) + residual)``, as one operation if that gives the same result.

    Use it to write a forward for :func:`~steadygrad.nn.register_block`. It calls the modules one after the other if
    ``norm`` is not a batch norm of `steadygrad.nn`, if ``norm`` or ``relu`` has hooks or a forward of its own, if there
    are global hooks, or if the sum has another shape or dtype.

    Args:
        norm: The batch norm.
        input: The input of the batch norm, of shape (N, C, ...).
        residual: The tensor to add; None for nothing. Default: None.
        relu: A ReLU or ReLU6 module, or the function of ``torch.nn.functional``; None for no activation. Any other
            activation is called after the addition. Default: None.
        in_place: Whether the sum is written into the batch norm's output if they are not one operation. Default: False.

    Raises:
        Exception: Whatever the modules raise.
    """
    one = is_norm(norm) and isinstance(input, Tensor) and not any_global_hook()
    if one and (residual is None or _fits(residual, input)):
        called: Any = norm
        activation = activation_of(relu)
        output = BatchNorm.forward(called, input, residual, activation)
        return output if relu is None or activation is not None else relu(output)
    output = norm(input)
    if residual is not None:
        output = output.add_(residual) if in_place else output + residual
    return output if relu is None else relu(output)


def _fits(residual: Any, input: Tensor) -> bool:
    return (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
        and residual.layout == input.layout
    )


@dataclass(frozen=True)
class Steps:
    """Describes a block's forward by the names of its members: layers, then an addition, then an activation.

    A residual block is ``Steps("conv1 bn1 relu conv2 bn2", add=True, shortcut="downsample?", last="relu")``. Names are
    separated by spaces. Every name is that of a module which is an attribute of the block, so functions such as
    ``torch.relu`` cannot be steps. A member whose name has a question mark may be None, and is then left out.

    A call with keyword arguments or with more than one input uses the block's own forward.

    Attributes:
        body: Names of the layers, in the order of their calls.
        add: Whether the block's input is added to their output, or the name of the attribute that says so.
        before_add: Names of modules between the layers and the addition; called only if there is an addition.
        shortcut: Names of modules that the input goes through before it is added.
        last: Name of the activation after the addition or, if there is none, after the layers.
        in_place: Whether the addition is written ``y += x``.
        unless: Name of an attribute; if it is true, the block uses its own forward.
        end: A function that takes the block and the result, and returns the block's output.

    Raises:
        TypeError: An argument is of another type.
        ValueError: A name cannot be that of a member, as with "+" or "self.conv", or ``last`` has several names.
    """

    body: str
    add: bool | str = False
    before_add: str = ""
    shortcut: str = ""
    last: str = ""
    in_place: bool = False
    unless: str = ""
    end: Callable[[Any, Any], Any] | None = None

    def __post_init__(self) -> None:
        """Refuses names that no member can have."""
        for field in ("body", "before_add", "shortcut", "last", "unless"):
            names = getattr(self, field)
            if not isinstance(names, str):
                raise TypeError(
                    f"Steps: {field}: expected a str of names, got {type(names).__name__}"
                )
            for name in names.split():
                _check_name(field, name, optional=field != "unless")
        if isinstance(self.add, str):
            _check_name("add", self.add, optional=False)
        elif not isinstance(self.add, bool):
            raise TypeError(
                f"Steps: add: expected a bool or the name of an attribute, got {self.add!r}"
            )
        if len(self.last.split()) > 1:
            raise ValueError(
                f"Steps: last: expected one name, that of the activation, got {self.last!r}"
            )
        if self.end is not None and not callable(self.end):
            raise TypeError(f"Steps: end: expected a function or None, got {self.end!r}")

    def absent(self, block: nn.Module) -> list[str]:
        """Returns the names that are no attributes of the block at all, not even as None."""
        names = f"{self.body} {self.before_add} {self.shortcut} {self.last} {self.unless}".split()
        if isinstance(self.add, str):
            names.append(self.add)
        plain = dict.fromkeys(name.rstrip("?") for name in names)
        return [name for name in plain if not hasattr(block, name)]

    def why_not(self, block: nn.Module) -> str:
        """Returns why the block has to run its own forward; empty if calling its members does the same."""
        if self.unless and getattr(block, self.unless, True):
            return f"{self.unless} is true"
        if isinstance(self.add, str) and not hasattr(block, self.add):
            return f"it has no attribute {self.add!r}"
        names = f"{self.body} {self.before_add} {self.shortcut} {self.last}"
        for name in names.split():
            plain = name.rstrip("?")
            module = block._modules.get(plain)
            if module is not None:
                if not is_plain(module):
                    return f"its member {plain!r} has hooks or a forward of its own"
                continue
            # A misspelt name with a question mark must not be taken for a member that is None.
            member = getattr(block, plain, self)
            if member is self:
                return f"it has no member {plain!r}"
            if member is not None:
                return f"its attribute {plain!r} is no registered module"
            if name == plain:
                return f"its member {plain!r} is None"
        return ""

    def plan(self, block: nn.Module) -> tuple[list[Call], Any, list[Any] | None, Any]:
        """Returns the layers' calls, the batch norm that adds, the shortcut (None: no addition) and the activation."""
        adds = getattr(block, self.add, False) if isinstance(self.add, str) else self.add
        names = f"{self.body} {self.before_add if adds else self.last}"
        calls = list(planned(_members(block, names)))
        norm = None
        shortcut = _members(block, self.shortcut) if adds else None
        if shortcut is not None:
            inner = leaves(shortcut)
            while calls and is_passed(calls[-1][0]):
                calls.pop()
            last, taken, _ = calls[-1] if calls else (None, [], None)
            still = all(_is_still(module) and module is not last for module in inner)
            if is_norm(last) and not taken and still:
                norm, *_ = calls.pop()
        (last_module,) = _members(block, self.last) or [None]
        return calls, norm, shortcut, last_module if adds else None

    def __call__(self, block: nn.Module, input: Any) -> Any:
        """Calls the members, each batch norm together with what it is fused with."""
        calls, norm, shortcut, last = self.plan(block)
        output = run(calls, input)
        if shortcut is not None:
            residual = input
            for module in shortcut:
                residual = module(residual)
            output = batch_norm_add_relu(
                norm or _unchanged, output, residual, last, in_place=self.in_place
            )
        return output if self.end is None else self.end(block, output)


def found(module: nn.Module, forward: Forward | None) -> list[tuple[nn.Module, str, str]]:
    """Returns, for each batch norm that a chain or block calls: the module, its operation, and why it has none."""
    if isinstance(forward, Steps):
        calls, norm, shortcut, last = forward.plan(module)
        after = "" if shortcut is None else "an addition"
    else:
        calls, norm, shortcut, after = list(planned(module._modules.values())), None, None, ""
        last = None
    seen: list[tuple[nn.Module, str, str]] = []
    for called, _, activation in reversed(calls):
        if isinstance(called, BatchNorm):
            why = f"it is followed by {after}" if after else ""
            own = activation_of(act_of(called))
            seen.append((called, operation(activation or own), why))
        if not is_passed(called):
            after = _described(called)
    if norm is not None:
        seen.append((norm, operation(activation_of(last), adds=True), ""))
    for inner in leaves(shortcut or []):
        if isinstance(inner, BatchNorm):
            seen.append((inner, "", "it is what another batch norm adds" if norm else ""))
    return seen


def _described(module: Any) -> str:
    if module is None:
        return ""
    hooks = "" if is_plain(module) else " with hooks or a forward of its own"
    return f"{type(module).__name__}{hooks}"


def _check_name(field: str, name: str, optional: bool) -> None:
    plain = name.removesuffix("?") if optional else name
    if re.fullmatch(r"\w+", plain):
        return
    message = f"Steps: {field}: expected names of members such as 'conv bn relu', got {name!r}"
    if "+" in name:
        message += "; an addition is add=True, and the activation after it last='relu'"
    elif name.startswith("self."):
        message += f"; write {name.removeprefix('self.')!r}"
    raise ValueError(message)


def _unchanged(input: Any) -> Any:
    return input


def _members(block: nn.Module, names: str) -> list[Any]:
    found = (block._modules.get(name.rstrip("?")) for name in names.split())
    return [module for module in found if module is not None]


def _is_still(module: Any) -> bool:
    return is_norm(module) or (_is_one_of(_STILL, module) and is_plain(module))
