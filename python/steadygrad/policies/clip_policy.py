"""The base class of clip policies, for steadygrad's own and for those that users write in Python."""

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
    r"""Computes the limit of each step; subclass it to write a clip policy in Python, on torch tensors.

    A step calls :meth:`limits` between its two passes, with the norms of the gradients before the clip, and clips each
    scope by :math:`\min(1, \text{limit} / (N + 10^{-6}))`, as it does with ``max_norm``.

    Examples:
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

    **Steps that are not taken.** On the CPU ``limits`` is not called for steps that are skipped or refused. On a CUDA
    device only the device knows whether a step is taken. So ``limits`` is called for every step there, and all norms
    are NaN if the step is not taken, for whatever reason. The limits do not matter then, but the policy's state has to
    stay as it is. A policy that learns only from finite norms above 0, like the one above, is right on both. Under
    ``nonfinite="propagate"`` the CPU passes non-finite norms, too. A norm of 0 carries no information: it is all there
    is in the step with which ``torch.distributed.checkpoint`` creates an optimizer's state.

    **Without waiting.** Work on tensors: ``norms.item()``, an ``if`` on a tensor or a result on the CPU would wait for
    the device. Gradients are disabled. An exception refuses the step, and nothing has changed except what ``limits``
    itself has changed.

    **State** belongs to the object, so use one object per optimizer. :meth:`state_dict` is saved with the optimizer, as
    text under the key ``clip_state`` of its param groups. A state that cannot be saved is an error when the optimizer
    takes the policy over, and later only when it is saved. :meth:`load_state_dict` is called before the first step that
    follows a load. A checkpoint without this state, or with that of a policy of another name, restores the state that
    the object had when the optimizer took it over. Saving and loading wait for the device.

    **Several processes.** The norms are those over all ranks, so policies that do the same on all ranks give the same
    limits. If the policy raises on one rank, the step is refused on all ranks that step together; to learn of it takes
    one more collective, which is waited for. Under DistributedDataParallel every rank decides by itself, so an
    exception concerns its own rank only.

    **CUDA graphs.** A captured step records what ``limits`` does with tensors. The Python code itself runs once, at the
    capture. So keep state in tensors that are written in place, and return a tensor: a number would be the same in
    every replay. As with every step, step once before the capture.

    Attributes:
        default_scope: The ``clip_scope`` of an optimizer for which none is given. Default: ``"global"``.
    """

    default_scope: ClassVar[Scope] = "global"

    @abstractmethod
    def limits(self, norms: Tensor) -> Tensor | float:
        """Returns the limit of each scope's norm for this step.

        Args:
            norms: A copy of the norms, float64, shape (scopes,), on the parameters' device. Depending on
                ``clip_scope`` it holds the total norm, a norm per param group, or a norm per parameter, in the order of
                the param groups, with 0 for parameters without a gradient.

        Returns:
            A tensor of the same shape, or a 0-d tensor for all scopes alike, on the same device; or a number. Infinity
            means no limit. A negative or NaN number is an error, and so is such an element of a CPU tensor. On a CUDA
            device such an element means no limit.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns the state to save: numbers, strings, booleans, None, tensors, and lists and dicts of them.

        Returns:
            Every attribute of the object, including those in ``__slots__``, unless a subclass overrides this method.
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
        """Loads what :meth:`state_dict` has returned.

        Args:
            state: The saved attributes, with tensors on the parameters' device, and tuples as lists. A tensor attribute
                of the same shape, dtype and device is written in place, so that captured graphs see it. All other
                attributes are replaced. A subclass may override this method.
        """
        for name, value in state.items():
            held = getattr(self, name, None)
            if isinstance(held, Tensor) and isinstance(value, Tensor) and _alike(held, value):
                held.copy_(value)
            else:
                setattr(self, name, value)

    @property
    def for_kernels(self) -> _kernels.ClipPolicy | None:
        """Returns what tells the kernels that this policy gives the limits."""
        return _kernels.ClipPolicy("given")


@dataclass(frozen=True)
class KernelClipPolicy(KernelPolicy, ClipPolicy):
    """A clip policy whose limits the kernels compute within the step."""

    @property
    def for_kernels(self) -> _kernels.ClipPolicy | None:
        """Returns what a plan takes, or None if a constant limit is all there is to the policy."""
        return None

    def limits(self, norms: Tensor) -> Tensor | float:
        """Raises NotImplementedError: the kernels compute the limits, and nothing calls this method."""
        raise NotImplementedError(
            f"{type(self).__name__}.limits: expected a step to find the limits, got a call from outside"
        )


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
