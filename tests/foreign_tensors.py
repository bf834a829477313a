"""Tensors that say they are on another device, and keep their numbers on the CPU: such devices are not here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only


class Foreign(Tensor):
    """A tensor on a device that torch was not built for.

    It refuses what torch refuses: an operation on tensors of different devices, unless one is a number on the CPU. And
    a copy to the CPU that is not waited for, since whoever reads it might come too early.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Foreign:
        made: Foreign = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=device
        )
        made.inner = inner
        return made

    def copy_(self, src: Tensor, non_blocking: bool = False) -> Foreign:
        """Copy numbers from any device; autograd's copy would look for this one in torch."""
        self.inner.copy_(numbers(src))
        return self

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        device = next((t.device for t in tensors if isinstance(t, Foreign)), torch.device("cpu"))
        if func is torch.ops.aten._to_copy.default:
            device = torch.device(kwargs.pop("device", None) or tensors[0].device)
            assert not (kwargs.get("non_blocking") and device.type == "cpu"), "read too early"
        else:
            others = {t.device for t in tensors if t.device != device and t.ndim > 0}
            assert not others, f"{func}: expected all tensors on {device}, got some on {others}"
            kwargs.pop("device", None)
        bare = tree_map_only(Foreign, lambda t: t.inner, (args, kwargs))
        result = func(*bare[0], **bare[1])
        if func._schema.is_mutable:
            return args[0]
        if device.type == "cpu":
            return result
        return tree_map_only(Tensor, lambda t: cls(t, device), result)


class ForeignDevices(TorchFunctionMode):
    """While it is entered, tensors can be moved to devices that are not here."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.to and isinstance(args[1], torch.device) and args[1].type != "cpu":
            return Foreign(numbers(args[0]).clone(), args[1])
        return func(*args, **(kwargs or {}))


def parameter(values: Tensor, device: str) -> Parameter:
    """Return a parameter with these numbers on ``device``, the CPU or one that is not here."""
    data = values.clone()
    return Parameter(data if device == "cpu" else Foreign(data, torch.device(device)))


def numbers(tensor: Tensor) -> Tensor:
    """Return its numbers, on the CPU."""
    detached = tensor.detach()
    return detached.inner if isinstance(detached, Foreign) else detached
