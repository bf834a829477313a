"""Batch norm, addition and ReLU as one call, wherever at run time nothing speaks against it.

The modules themselves are left as they were: a batch norm that is called on its own normalises and does no more.
What makes one call of three is the caller. So every other way to reach the modules, a hook, a slice of an
`nn.Sequential` or a forward of one's own, finds what it found before.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from steadygrad.nn.batch_norm import _BatchNorm as BatchNorm


def is_unhooked(module: nn.Module) -> bool:
    """Whether nobody waits for this module to be called."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_plain_relu(module: nn.Module) -> bool:
    """Whether it is a ReLU that may go uncalled."""
    return type(module) is nn.ReLU and is_unhooked(module)


def is_chain(module: nn.Module) -> bool:
    """Whether it calls its children one after the other and does nothing else."""
    forward = type(module).forward
    return forward is nn.Sequential.forward or forward is run_chain


def ends_in_batch_norm(module: nn.Module | None) -> bool:
    """Whether it is a batch norm without an activation, or a chain that ends in one; none with hooks."""
    while module is not None and is_unhooked(module):
        if isinstance(module, BatchNorm):
            return module.activation is None and type(module).forward is BatchNorm.forward
        if not is_chain(module) or not module._modules:
            return False
        module = module._modules[next(reversed(module._modules))]
    return False


def batch_norm_add_relu(
    norm: nn.Module,
    input: Tensor,
    residual: Tensor | None = None,
    in_place: bool = False,
    relu: nn.Module | bool = False,
) -> Tensor:
    """`relu(norm(input) + residual)`, as one operation where that gives the same.

    Args:
        norm: a batch norm, or an `nn.Sequential` that ends in one.
        input: what `norm` is called with.
        residual: what is added, or None.
        in_place: whether the addition was written in place of the batch norm's output: `y += residual`.
        relu: the module to call; True for the function; False for none.
    """
    if (
        isinstance(input, Tensor)
        and ends_in_batch_norm(norm)
        and (isinstance(relu, bool) or is_plain_relu(relu))
    ):
        return _fused(norm, input, residual, in_place, relu is not False)
    output = _added(norm(input), residual, in_place)
    if isinstance(relu, bool):
        return F.relu(output) if relu else output
    return cast(Tensor, relu(output))


def _fused(
    norm: nn.Module, input: Tensor, residual: Tensor | None, in_place: bool, relu: bool
) -> Tensor:
    while not isinstance(norm, BatchNorm):
        *before, norm = norm.children()
        input = _run(before, input)
    if residual is not None and not _fits(residual, input):
        output = _added(norm._normalize(input, None, None), residual, in_place)
        return F.relu(output) if relu else output
    return norm._normalize(input, residual, "relu" if relu else None)


def _fits(residual: Any, input: Tensor) -> bool:
    """Whether the sum has the batch norm's own shape and dtype."""
    return (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
        and residual.layout == input.layout
    )


def _added(output: Tensor, residual: Tensor | None, in_place: bool) -> Tensor:
    if residual is None:
        return output
    return output.add_(residual) if in_place else output + residual


def _run(modules: list[nn.Module], input: Any) -> Any:
    """Call modules one after the other, each ReLU together with the batch norm before it."""
    following = iter([*modules[1:], None])
    called = iter(modules)
    for module in called:
        after = next(following)
        if (
            after is not None
            and type(after) is nn.ReLU
            and is_unhooked(after)
            and isinstance(input, Tensor)
            and ends_in_batch_norm(module)
        ):
            input = _fused(module, input, None, False, True)
            next(called)
            next(following)
        else:
            input = module(input)
    return input


def run_chain(self: nn.Module, input: Any) -> Any:
    """The forward of an `nn.Sequential` that calls each ReLU together with the batch norm before it."""
    return _run(list(self.children()), input)
