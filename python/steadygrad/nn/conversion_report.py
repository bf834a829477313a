"""Reports what `convert_batchnorm` did to a model, from the model itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from types import CodeType
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from steadygrad.nn.batch_norm import _BatchNorm as BatchNorm
from steadygrad.nn.convert import original_class, why_left
from steadygrad.nn.fusion import (
    Forward,
    Steps,
    act_of,
    activation_of,
    any_global_hook,
    found,
    is_chain,
    is_passed,
    is_plain,
    leaves,
    norm_act,
    operation,
)
from steadygrad.nn.known_blocks import known_forward, stands
from steadygrad.nn.read_forward import FUNCTIONS, read_forward

FUSED, CONVERTED, LEFT = "fused", "converted", "left"
REGISTERED = "batch_norm_add_relu"
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


class Said(NamedTuple):
    """Holds what a module that calls a batch norm says of it: the three last fields of `Finding`."""

    operation: str = ""
    reason: str = ""
    line: str = ""


_NOTHING = Said()


@dataclass(frozen=True)
class Finding:
    """What became of one batch norm.

    Attributes:
        name: Name of the module in the model; the first one, if it has several.
        kind: Name of the module's class.
        status: "fused", "converted" (to ours, but not fused) or "left" (as it was).
        operation: The operations computed at once, such as "batch norm + ReLU"; empty if not fused.
            "batch_norm_add_relu" if a function given to `register_block` decides which these are.
        reason: Why the batch norm was not fused or not converted; if fused, by what, where that is not
            `convert_batchnorm`: its own activation, or the function that was registered.
        line: The line to write by hand to have it fused; empty if there is none.
    """

    name: str
    kind: str
    status: str
    operation: str = ""
    reason: str = ""
    line: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """What became of every batch norm of a model; `str()` gives a table.

    Attributes:
        findings: A :class:`Finding` for each batch norm, in the order of the model.
    """

    findings: tuple[Finding, ...]

    @property
    def fused(self) -> tuple[Finding, ...]:
        """Returns the batch norms that are fused with an addition, an activation or both."""
        return self._of(FUSED)

    @property
    def not_fused(self) -> tuple[Finding, ...]:
        """Returns the batch norms that were converted to ours but are not fused."""
        return self._of(CONVERTED)

    @property
    def left(self) -> tuple[Finding, ...]:
        """Returns the batch norms that were not converted."""
        return self._of(LEFT)

    @property
    def operations(self) -> dict[str, int]:
        """Returns the number of fused batch norms by operation, such as "batch norm + ReLU"."""
        return dict(sorted(Counter(finding.operation for finding in self.fused).items()))

    def __str__(self) -> str:
        done = ", ".join(f"{count} x {name}" for name, count in self.operations.items())
        total = len(self.findings)
        lines = [
            f"{total} batch norms: {len(self.fused)} fused{f' ({done})' if done else ''}, "
            f"{len(self.not_fused)} converted only, {len(self.left)} left"
        ]
        rows = [
            (
                f.name or "(model)",
                f.kind,
                f.status,
                ", ".join(filter(None, (f.operation, f.reason))),
            )
            for f in self.findings
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
        for row in rows:
            lines.append("  ".join(map(str.ljust, row, widths)).rstrip())
        to_write = dict.fromkeys(finding.line for finding in self.findings if finding.line)
        if to_write:
            lines += [
                "write this, and call convert_batchnorm again:",
                *(f"    {line}" for line in to_write),
            ]
        return "\n".join(lines)

    def _of(self, status: str) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.status == status)


def conversion_report(model: nn.Module) -> ConversionReport:
    """Reports which batch norms of a model `convert_batchnorm` fused, which not, why, and what to write by hand.

    The report describes the modules as they are now, in their present mode. Nothing is run or changed. A module that
    got hooks since the conversion is reported as not fused. Before the conversion every batch norm is reported as left.

    Args:
        model: A model that `convert_batchnorm` has converted, or a part of one.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"conversion_report: model: expected a torch.nn.Module, got {type(model).__name__}"
        )
    seen: dict[nn.Module, Said] = {}
    for module in model.modules():
        for norm, said in _seen(module):
            if not seen.get(norm, _NOTHING).operation and (said.operation or said.reason):
                seen[norm] = said
    return ConversionReport(
        tuple(
            _finding(name, module, seen.get(module, _NOTHING))
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm)
        )
    )


def _finding(name: str, norm: nn.Module, said: Said) -> Finding:
    kind = type(norm).__name__
    if not isinstance(norm, BatchNorm):
        return Finding(name, kind, LEFT, reason=why_left(norm) or "not converted")
    if said.operation:
        return Finding(name, kind, FUSED, said.operation, said.reason)
    if norm.activation is not None:
        reason = f"by its own activation={norm.activation!r}"
        return Finding(name, kind, FUSED, operation(norm.activation), reason)
    if not is_plain(norm):
        said = Said(reason="it has hooks or a forward of its own")
    return Finding(
        name,
        kind,
        CONVERTED,
        reason=said.reason or "nothing that could be fused follows it",
        line=said.line,
    )


def _seen(module: nn.Module) -> Iterator[tuple[nn.Module, Said]]:
    """Yields each batch norm that a module itself calls, with what is to be said of it."""
    kind = original_class(module)
    if isinstance(module, BatchNorm):
        if type(module).forward is norm_act and not is_passed(act_of(module)):
            drop, act = module._modules["drop"], module._modules["act"]
            after = type(act if is_passed(drop) else drop).__name__
            fused = operation(activation_of(act_of(module)))
            yield module, Said(fused, "" if fused else f"it is followed by {after}")
        return
    if kind in _CONTAINERS:
        return
    changed, forward = known_forward(kind)
    if is_chain(module) or isinstance(forward, Steps):
        why = _why_not_fused(module, kind, forward)
        fits = forward is None or stands(module, forward)
        for norm, fused, reason in found(module, forward):
            if fused and not why:
                yield norm, Said(fused)
            else:  # steps that do not fit the block say nothing of what follows
                yield norm, Said(reason=why if fused or not fits else reason)
    elif forward is not None:
        yield from _seen_by_function(module, kind, forward)
    else:
        why = f"the forward of {kind.__name__} is not known"
        if changed:
            why = f"{changed} has another source than the version that is known"
        yield from _suggested(module, kind, why)


def _why_not_fused(module: nn.Module, kind: type[nn.Module], forward: Forward | None) -> str:
    """Returns why a chain or a block whose forward is known does not use it; empty if it does."""
    if any_global_hook():
        return "there are hooks on all modules"
    why = ""
    if isinstance(forward, Steps):
        why = forward.why_not(module)
    elif forward is not None and not stands(module, forward):
        name, member = next(
            (name, member)
            for name, member in module._modules.items()
            if member is None or not is_plain(member)
        )
        how = "is None" if member is None else "has hooks or a forward of its own"
        why = f"its member {name!r} {how}"
    if why:
        return f"{kind.__name__} uses its own forward: {why}"
    if kind is not type(module):
        return ""
    return "fuse was False" + ("" if forward is None else ", or the block was registered later")


def _seen_by_function(
    module: nn.Module, kind: type[nn.Module], forward: Forward
) -> Iterator[tuple[nn.Module, Said]]:
    """Yields the batch norms of a block with a registered function, of which only its names are looked at."""
    by = f"the forward registered for {kind.__name__}"
    why = _why_not_fused(module, kind, forward)
    if not why and not _mentions(getattr(forward, "__code__", None), "batch_norm_add_relu"):
        why = f"{by} does not call batch_norm_add_relu"
    for norm, path, is_last_of_chain in _called(module):
        if why or is_last_of_chain:
            yield norm, Said(reason=why or f"it is part of the chain {path}")
        else:
            yield norm, Said(REGISTERED, f"by {by}")


def _mentions(code: CodeType | None, name: str) -> bool:
    """Returns whether a function, or one inside it, uses a name; True if there is no code to look at."""
    if code is None or name in code.co_names + code.co_freevars:
        return True
    return any(_mentions(inner, name) for inner in code.co_consts if isinstance(inner, CodeType))


def _suggested(
    module: nn.Module, kind: type[nn.Module], why: str
) -> Iterator[tuple[nn.Module, Said]]:
    """Yields the batch norms of a block that is not known, with what its source shows to write for them."""
    read = read_forward(kind.forward)
    if read is not None and not all(_is_layer(module, name) for name in read.names):
        read = None
    steps = None if read is None else read.steps
    if steps is not None and not steps.why_not(module):
        line = f"sg.nn.register_block({kind.__name__}, {_written(steps)})"
        for norm, fused, reason in found(module, steps):
            yield norm, Said(reason=why, line=line) if fused else Said(reason=reason)
        return
    for norm, path, is_last_of_chain in _called(module):
        adds, after = (False, "") if read is None else read.following(f"self.{path}")
        relu = f"relu={after}" if after and activation_of(_member(module, after)) else ""
        if is_last_of_chain:
            yield norm, Said(reason=why)
        elif read is None or adds or relu:
            residual = "residual" if adds else ""
            given = ", ".join(filter(None, (f"self.{path}, y", residual, relu)))
            call = f"forward(self, x) has sg.nn.batch_norm_add_relu({given})"
            if read is None:
                call = f"if ReLU or + follows: sg.nn.batch_norm_add_relu(self.{path}, ...)"
            line = f"sg.nn.register_block({kind.__name__}, forward)  # {call}"
            yield norm, Said(reason=why, line=line)
        elif after:
            yield norm, Said(reason=f"it is followed by {after}")


def _member(module: nn.Module, name: str) -> Any:
    """Returns what a name in a forward's source stands for: a member, or a function."""
    if name.startswith("self."):
        return getattr(module, name.removeprefix("self.").rstrip("?"), None)
    return FUNCTIONS[name]


def _is_layer(module: nn.Module, name: str) -> bool:
    member = _member(module, name)
    is_known = isinstance(member, nn.Module) or activation_of(member) is not None
    return is_known or (member is None and name[-1] == "?")


def _written(steps: Steps) -> str:
    """Returns the expression that makes these steps, without arguments that have their defaults."""
    given = [
        f"{field.name}={getattr(steps, field.name)!r}"
        for field in fields(steps)[1:]
        if getattr(steps, field.name) != field.default
    ]
    arguments = ", ".join([repr(steps.body), *given]).replace("'", '"')
    return f"sg.nn.Steps({arguments})"


def _called(module: nn.Module) -> Iterator[tuple[nn.Module, str, bool]]:
    """Yields the batch norms that a module can call itself, their paths, and whether that is the path of a chain."""
    for name, child in module.named_children():
        if isinstance(child, BatchNorm):
            yield child, name, False
        elif type(child) in _CONTAINERS:
            for inner, path, is_last in _called(child):
                key = path if type(child) is nn.ModuleList else repr(path)
                yield inner, f"{name}[{key}]", is_last
        elif is_chain(child):
            *_, last = [None, *leaves([child])]
            if isinstance(last, BatchNorm):
                yield last, name, True
