"""Gives modules of a model a forward in which batch norms are fused, and takes nothing else from them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import nn

from steadygrad.nn.batch_norm import _BatchNorm as BatchNorm
from steadygrad.nn.derived_classes import derived_class
from steadygrad.nn.fused_calls import (
    ends_in_batch_norm,
    is_chain,
    is_plain_relu,
    run_chain,
)
from steadygrad.nn.fusion import Fusion, find_fusion

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was fused."""
    kind = type(module)
    return kind.__mro__[1] if "_original_forward" in vars(kind) else kind


def is_fused(module: nn.Module) -> bool:
    """Whether this module's class was exchanged for a fused one."""
    return original_class(module) is not type(module)


def stored_fusion(module: nn.Module) -> Fusion | None:
    """What is in effect in the module's own forward."""
    stored = vars(module).get("_fusion")
    return stored if isinstance(stored, Fusion) else None


def fuse(module: nn.Module) -> None:
    """Give one module, not its children, a fused forward if that has anything to gain."""
    if is_chain(module):
        if not is_fused(module) and any(pairs(module)):
            object.__setattr__(module, "__class__", _fused_class(type(module)))
    elif owns_batch_norms(module):
        fusion = find_fusion(module, original_class(module).forward)
        if fusion.is_useful:
            if not is_fused(module):
                object.__setattr__(module, "__class__", _fused_class(type(module)))
            vars(module)["_fusion"] = fusion


def pairs(chain: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The children of a chain that end in a batch norm and come before a ReLU, each with that ReLU."""
    for module, after in pairwise(chain._modules.values()):
        if ends_in_batch_norm(module) and after is not None and is_plain_relu(after):
            assert module is not None
            yield module, after


def owns_batch_norms(module: nn.Module) -> bool:
    """Whether its class has a forward of its own, which can call a batch norm without another forward between."""
    kind = original_class(module)
    if kind.__module__.partition(".")[0] == "torch" or isinstance(
        module, (BatchNorm, *_CONTAINERS)
    ):
        return False
    return not is_chain(module) and any(True for _ in owned_batch_norms(module))


def owned_batch_norms(module: nn.Module) -> Iterator[nn.Module]:
    """The batch norms that a module can call itself: below it there are only containers and chains."""
    for child in module.children():
        if isinstance(child, BatchNorm):
            yield child
        elif isinstance(child, _CONTAINERS) or is_chain(child):
            yield from owned_batch_norms(child)


def _fused_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass that differs in its forward alone; the module stays an instance of `kind`."""
    name = f"Fused{kind.__name__}"
    return derived_class(name, (kind,), _members, _fused_class, fuse)


def _members(kind: type[nn.Module]) -> dict[str, object]:
    original = kind.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        fusion: Any = self._fusion
        if fusion is not None and not kwargs:
            variant = fusion.training if self.training else fusion.evaluation
            if variant is not None and variant.conditions.hold(self, args):
                return variant.run(self, *args)
        return original(self, *args, **kwargs)

    is_chain = original is nn.Sequential.forward
    return {
        "_fusion": None,
        "_original_forward": original,
        "forward": run_chain if is_chain else forward,
    }
