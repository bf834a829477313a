"""What `convert_batchnorm` did to a model, found out from the model itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from steadygrad.nn.batch_norm import _BatchNorm as BatchNorm
from steadygrad.nn.convert import why_left
from steadygrad.nn.fused_calls import is_chain, is_plain_relu, is_unhooked
from steadygrad.nn.fused_modules import (
    is_fused,
    original_class,
    owned_batch_norms,
    owns_batch_norms,
    pairs,
    stored_fusion,
)
from steadygrad.nn.fusion import ADD, ADD_RELU, RELU, find_fusion

FUSED, CONVERTED, LEFT = "fused", "converted", "left"


@dataclass(frozen=True)
class Finding:
    """What became of one batch norm.

    Attributes:
        name: of the module in the model; the first one, if it has several.
        kind: name of its class.
        status: "fused", "converted" (to ours, and not fused) or "left" (as it was).
        operation: what is computed at once, "batch norm + ReLU" and the like; empty if not fused.
        reason: why it was not fused or not converted; empty if fused.
    """

    name: str
    kind: str
    status: str
    operation: str = ""
    reason: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """What became of every batch norm of a model; `str()` gives a table.

    Attributes:
        findings: one for each batch norm, in the order of the model.
    """

    findings: tuple[Finding, ...]

    @property
    def fused(self) -> tuple[Finding, ...]:
        """The batch norms that take on an addition, a ReLU or both."""
        return self._of(FUSED)

    @property
    def not_fused(self) -> tuple[Finding, ...]:
        """The batch norms that are ours and take on nothing."""
        return self._of(CONVERTED)

    @property
    def left(self) -> tuple[Finding, ...]:
        """The batch norms that are not ours."""
        return self._of(LEFT)

    @property
    def operations(self) -> dict[str, int]:
        """How many batch norms compute what: counts of "batch norm + ReLU" and the like."""
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
            (f.name or "(model)", f.kind, f.status, f.operation or f.reason) for f in self.findings
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
        for row in rows:
            lines.append("  ".join(map(str.ljust, row, widths)).rstrip())
        return "\n".join(lines)

    def _of(self, status: str) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.status == status)


def conversion_report(model: nn.Module) -> ConversionReport:
    """What `convert_batchnorm` fused in a model, what it could not, and why.

    It looks at the model as it is now, and changes nothing: modules that were given hooks since the conversion are
    reported as what they are now, not fused. Before the conversion everything is reported as left.

    Args:
        model: a model that `convert_batchnorm` has converted, or a part of one.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"conversion_report: model: expected a torch.nn.Module, got {type(model).__name__}"
        )
    survey = _Survey()
    for module in model.modules():
        survey.look_at(module)
    return ConversionReport(
        tuple(
            survey.finding(name, module)
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm)
        )
    )


class _Survey:
    def __init__(self) -> None:
        self._operations: dict[nn.Module, str] = {}
        self._reasons: dict[nn.Module, str] = {}

    def look_at(self, module: nn.Module) -> None:
        if is_chain(module):
            self._look_at_chain(module)
        elif owns_batch_norms(module):
            self._look_at_owner(module)

    def finding(self, name: str, norm: nn.Module) -> Finding:
        kind = type(norm).__name__
        if not isinstance(norm, BatchNorm):
            return Finding(name, kind, LEFT, reason=why_left(norm) or "not converted")
        operation = self._operations.get(norm)
        if operation:
            return Finding(name, kind, FUSED, operation)
        reason = self._reasons.get(norm, "nothing that could be fused follows it")
        if not is_unhooked(norm):
            reason = "it has hooks"
        elif norm.activation is not None:
            reason = f"it has its own activation, {norm.activation}"
        return Finding(name, kind, CONVERTED, reason=reason)

    def _look_at_chain(self, chain: nn.Module) -> None:
        fused = {_last(module) for module, _ in pairs(chain)} if is_fused(chain) else set()
        children = [child for child in chain._modules.values() if child is not None]
        for child, after in pairwise(children):
            norm = _last(child)
            if norm is None:
                continue
            if norm in fused:
                self._operations[norm] = RELU
            else:
                self._reasons[norm] = _followed_by(after)

    def _look_at_owner(self, owner: nn.Module) -> None:
        name = type(owner).__name__
        now, stored = find_fusion(owner, original_class(owner).forward), stored_fusion(owner)
        for norm in owned_batch_norms(owner):
            why = f"the forward of {name} cannot be traced: {now.problem}"
            self._reasons.setdefault(
                norm, why if now.problem else f"{name} does not call it itself"
            )
        for mode in ("evaluation", "training"):
            found, effective = getattr(now, mode), getattr(stored, mode, None)
            if found is None:
                continue
            for called, why in found.reasons.items():
                self._note(owner, called, self._reasons, why)
            for site in found.sites:
                if effective is not None and site in effective.sites:
                    self._note(owner, site.norm, self._operations, site.operation)
                else:
                    why = (
                        "a module that it needs has hooks" if is_fused(owner) else "fuse was False"
                    )
                    self._note(owner, site.norm, self._reasons, why)

    def _note(self, owner: nn.Module, called: str, notes: dict[nn.Module, str], text: str) -> None:
        norm = _last(owner.get_submodule(called))
        if norm is not None:
            notes[norm] = text


def _last(module: nn.Module | None) -> nn.Module | None:
    """The batch norm that a module is or, as a chain, ends in."""
    while module is not None and is_chain(module) and module._modules:
        module = module._modules[next(reversed(module._modules))]
    return module if isinstance(module, BatchNorm) else None


def _followed_by(module: nn.Module) -> str:
    if is_plain_relu(module):
        return "fuse was False"
    hooks = "" if is_unhooked(module) else " with hooks"
    return f"it is followed by {type(module).__name__}{hooks}"
