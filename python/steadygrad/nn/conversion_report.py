"""Reports what `convert_batchnorm` did to a model, from the model itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from steadygrad.nn.batch_norm import _BatchNorm as BatchNorm
from steadygrad.nn.convert import original_class, why_left
from steadygrad.nn.fusion import (
    ADD,
    ADD_RELU,
    RELU,
    Steps,
    acts,
    found,
    is_chain,
    is_passed,
    is_plain,
    is_relu,
    leaves,
    norm_act,
)
from steadygrad.nn.known_blocks import known_forward, stands

FUSED, CONVERTED, LEFT = "fused", "converted", "left"
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Finding:
    """What became of one batch norm.

    Attributes:
        name: Name of the module in the model; the first one, if it has several.
        kind: Name of the module's class.
        status: "fused", "converted" (to ours, but not fused) or "left" (as it was).
        operation: The operations computed at once, such as "batch norm + ReLU"; empty if not fused.
        reason: Why the batch norm was not fused or not converted; empty if fused.
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
        """Returns the batch norms that are fused with an addition, a ReLU or both."""
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
        counts = Counter(finding.operation for finding in self.fused)
        return {name: counts[name] for name in (RELU, ADD_RELU, ADD) if counts[name]}

    def __str__(self) -> str:
        done = ", ".join(f"{count} x {name}" for name, count in self.operations.items())
        total = len(self.findings)
        lines = [
            f"{total} batch norms: {len(self.fused)} fused{f' ({done})' if done else ''}, "
            f"{len(self.not_fused)} converted only, {len(self.left)} left"
        ]
        rows = [
            (f.name or "(model)", f.kind, f.status, f.operation or f.reason + _by_hand(f.line))
            for f in self.findings
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
        for row in rows:
            lines.append("  ".join(map(str.ljust, row, widths)).rstrip())
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
    operations: dict[nn.Module, str] = {}
    reasons: dict[nn.Module, tuple[str, str]] = {}
    for module in model.modules():
        for norm, operation, reason, line in _seen(module):
            if operation:
                operations.setdefault(norm, operation)
            elif reason:
                reasons[norm] = (reason, line)
    return ConversionReport(
        tuple(
            _finding(name, module, operations.get(module, ""), reasons.get(module))
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm)
        )
    )


def _finding(name: str, norm: nn.Module, operation: str, reason: tuple[str, str] | None) -> Finding:
    kind = type(norm).__name__
    if not isinstance(norm, BatchNorm):
        return Finding(name, kind, LEFT, reason=why_left(norm) or "not converted")
    if operation:
        return Finding(name, kind, FUSED, operation)
    if not is_plain(norm):
        reason = ("it has hooks or a forward of its own", "")
    elif norm.activation is not None:
        reason = (f"it has its own activation, {norm.activation}", "")
    why, line = reason or ("nothing that could be fused follows it", "")
    return Finding(name, kind, CONVERTED, reason=why, line=line)


def _seen(module: nn.Module) -> Iterator[tuple[nn.Module, str, str, str]]:
    """Yields each batch norm that a module itself calls, with its operation, or the reason and the line to write."""
    kind = original_class(module)
    if isinstance(module, BatchNorm):
        if type(module).forward is norm_act and not acts(module, is_passed):
            drop, act = module._modules["drop"], module._modules["act"]
            after = type(act if is_passed(drop) else drop).__name__
            yield module, RELU if acts(module, is_relu) else "", f"it is followed by {after}", ""
        return
    changed, forward = known_forward(kind)
    if kind in _CONTAINERS:
        return
    if not is_chain(module) and not isinstance(forward, Steps):
        why = f"the forward of {kind.__name__} is not known: steadygrad.nn.register_block tells it"
        if forward is not None:
            why = f"the forward registered for {kind.__name__} calls it"
        elif changed:
            why = f"{changed} has another source than the version that is known"
        for norm, path in _called(module):
            line = f"steadygrad.nn.batch_norm_add_relu(self.{path}, x, residual, self.relu)"
            yield norm, "", why, "" if forward is not None else line
        return
    why = ""
    if forward is not None and not stands(module, forward):
        why = f"a member of {kind.__name__} has hooks or a forward of its own, or is None"
    elif kind is type(module):
        why = "fuse was False"
    for norm, operation, reason in found(module, forward):
        yield norm, "" if why else operation, why if why and operation else reason, ""


def _by_hand(line: str) -> str:
    return f"; or write in it {line}" if line else ""


def _called(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yields the batch norms that a module can call itself, and their paths, on which there are only containers."""
    for name, child in module.named_children():
        if isinstance(child, BatchNorm):
            yield child, name
        elif type(child) in _CONTAINERS:
            for inner, path in _called(child):
                yield inner, f"{name}[{path if type(child) is nn.ModuleList else repr(path)}]"
        elif is_chain(child):
            *_, last = [None, *leaves([child])]
            if isinstance(last, BatchNorm):
                yield last, name
