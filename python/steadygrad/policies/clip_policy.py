"""Clip policies that a user writes in Python."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import MemberDescriptorType
from typing import Any, ClassVar

import torch
from torch import Tensor

from steadygrad import _kernels
from steadygrad.policies.policy import KernelPolicy, Scope


class ClipPolicy(ABC):
    r"""Base class of clip policies: of steadygrad's own, and of those that you write in Python, on torch tensors.

    A step calls :meth:`limits` between its two passes, with the norms of the gradients before the clip, and clips each
    scope by :math:`\min(1, \text{limit} / (N + 10^{-6}))`, as it does with ``max_norm``:

    >>> class ClipMedian(sg.ClipPolicy):
    ...     def __init__(self, factor=2.0, window=100):
    ...         self.factor = factor
    ...         self.norms = torch.full((window,), torch.nan, dtype=torch.float64)
    ...
    ...     def limits(self, norms):
    ...         self.norms = self.norms.to(norms.device)
    ...         limit = (self.factor * self.norms.nanmedian()).nan_to_num(nan=torch.inf)
    ...         moved = torch.cat([self.norms[1:], norms])
    ...         self.norms.copy_(torch.where(norms.isfinite() & (norms > 0), moved, self.norms))
    ...         return limit
    ...
    >>> opt = sg.optim.AdamW(model.parameters(), clip=ClipMedian())

    **Steps that are not taken.** On the CPU ``limits`` is not called for steps that are skipped or refused. On a device
    only the device knows: ``limits`` is called for every step, and where the step is not taken, for whatever reason,
    all norms are NaN. Limits do not matter then; state has to stay as it is. Learn from finite norms above 0 only, as
    above, and both are right. Under ``nonfinite="propagate"`` norms that are not finite come on the CPU too; a norm of
    0 says nothing, and is all that the step has by which ``torch.distributed.checkpoint`` makes state on a device.

    **Without waiting.** Work on tensors: ``norms.item()``, ``if`` on a tensor or a result on the CPU would wait for the
    device. Gradients are off. An exception refuses the step: nothing has changed but what ``limits`` itself has.

    **State** is the object's own: one object per optimizer. :meth:`state_dict` is saved with the optimizer, as text in
    the key ``clip_state`` of its param groups; where it cannot be, saving raises, and nothing else does after the first
    step. :meth:`load_state_dict` is called before the first step that follows a load. A checkpoint without it, or of a
    policy of another name, brings back the state that the object had when the optimizer took it over. Saving and
    loading wait for the device.

    **Several processes.** Norms are those over all ranks, so ranks whose policies do the same keep the same limits.
    Where the policy raises on one rank, the step is refused on all that step together, which takes one more collective
    and waits for it. Under DistributedDataParallel ranks decide by themselves: an exception on one of them is its own.

    **CUDA graphs.** A captured step records what ``limits`` does with tensors; the Python code itself runs once, at the
    capture. So keep state in tensors that are written in place, and return a tensor: a number is the same in every
    replay. ``limits`` has to be called once before a graph is captured, as every step has.

    Attributes:
        default_scope: the ``clip_scope`` of an optimizer that is given none. Default: ``"global"``.
    """

    default_scope: ClassVar[Scope] = "global"

    @abstractmethod
    def limits(self, norms: Tensor) -> Tensor | float:
        """The limit of each scope's norm, for this step.

        Args:
            norms: float64, (scopes,), on the parameters' device, a copy: the total norm; one per param group; or one
                per parameter, in the order of the param groups, 0 for those without a gradient.

        Returns:
            A tensor of the same shape, or of none for all scopes alike, on the same device, or a number. Infinity is no
            limit. A number that is negative or NaN, or such an element on the CPU, is an error; on a device such an
            element is no limit.
        """

    def state_dict(self) -> dict[str, Any]:
        """What is saved: numbers, strings, booleans, None, tensors, and lists and dicts of them.

        Returns:
            Every attribute of the object, those in ``__slots__`` included, unless a subclass says otherwise.
        """
        slots = {
            name: getattr(self, name)
            for kind in type(self).__mro__
            for name, member in vars(kind).items()
            if isinstance(member, MemberDescriptorType) and hasattr(self, name)
        }
        return {**vars(self), **slots}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` has given.

        Args:
            state: its tensors on the parameters' device, tuples as lists. A tensor attribute of the same shape, dtype
                and device is written in place, so that captured graphs see it; others are replaced, unless a subclass
                says otherwise.
        """
        for name, value in state.items():
            held = getattr(self, name, None)
            if isinstance(held, Tensor) and isinstance(value, Tensor) and _alike(held, value):
                held.copy_(value)
            else:
                setattr(self, name, value)

    @property
    def for_kernels(self) -> _kernels.ClipPolicy | None:
        """For the step: limits are given."""
        return _kernels.ClipPolicy("given")


@dataclass(frozen=True)
class KernelClipPolicy(KernelPolicy, ClipPolicy):
    """A clip policy that the kernels know: they find its limits, within the step."""

    @property
    def for_kernels(self) -> _kernels.ClipPolicy | None:
        """What a plan takes; None where a constant limit says it all."""
        return None

    def limits(self, norms: Tensor) -> Tensor | float:
        """Not asked."""
        raise NotImplementedError(
            f"{type(self).__name__}.limits: expected a step to find the limits, got a call from outside"
        )


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
