"""Memory that kernels write to: the outcome of a call, and scratch space on the tensors' device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steadygrad import _kernels


def is_asynchronous(device: torch.device) -> bool:
    """Returns whether kernels on this device run asynchronously, so that reading a result would wait for them."""
    if not _kernels.is_asynchronous(device.type):
        return False
    # torch for ROCm calls its devices "cuda", too, but kernels for CUDA do not run there.
    return device.type != "cuda" or torch.version.hip is None


def keep_for_graphs(kept: list[Tensor], *replaced: Tensor) -> None:
    """Appends the replaced tensors to ``kept``, since a captured graph may still use them; the CPU has no graphs."""
    kept += [tensor for tensor in replaced if is_asynchronous(tensor.device)]


def is_number_on(value: Any, device: torch.device | None) -> bool:
    """Returns whether ``value`` is a one-element tensor on this asynchronous device, which kernels read themselves."""
    return (
        device is not None
        and isinstance(value, Tensor)
        and value.device == device
        and value.numel() == 1
        and value.dtype in (torch.float32, torch.float64)
        and is_asynchronous(device)
    )


def allocator(device: torch.device | None) -> Callable[[int], Tensor]:
    """Returns a function that allocates ``nbytes`` of scratch space on the device; the CPU's kernels never call it."""
    return lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=device)


class Outcome:
    """Holds on an asynchronous device what :class:`_kernels.Outcome` holds on the host: what a call has found and done.

    The attributes ``skipped``, ``refused`` and ``clipped`` are False, since the device counts such steps itself.
    """

    skipped = refused = clipped = False

    def __init__(self, device: torch.device) -> None:
        self.record = torch.empty(_kernels.OUTCOME_BYTES // 8, dtype=torch.float64, device=device)

    def _part(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.record.view(dtype)[_kernels.OUTCOME_OFFSETS[name] // dtype.itemsize]

    def norm(self, wide: bool) -> Tensor:
        """Returns the norm as a 0-d tensor of float64 or float32, without waiting for the device."""
        part = ("norm", torch.float64) if wide else ("norm_float32", torch.float32)
        return self._part(*part).clone()

    def found_nonfinite(self) -> Tensor:
        """Returns 1.0 if there were non-finite elements or they skipped the step, else 0.0, without waiting."""
        skipped, spiked = (self._part(name, torch.uint8) for name in ("skipped", "spiked"))
        return ((self._part("nonfinite", torch.int64) > 0) | (skipped > spiked)).float()

    def read(self) -> _kernels.Outcome:
        """Copies the outcome to the host, which waits for the device."""
        return _kernels.Outcome(self.record.cpu())


class NormOutput:
    """Holds the tensors that kernels write a norm to; the CPU's kernels return the norm instead."""

    def __init__(self, device: torch.device | None) -> None:
        self.tensors: tuple[Tensor, Tensor, Tensor] | None = None
        if device is not None:
            self.outcome = Outcome(device)
            self.tensors = (
                self.outcome.record,
                torch.empty((), dtype=torch.float32, device=device),
                torch.empty((), dtype=torch.float64, device=device),
            )

    def result(self, norm: float, wide: bool) -> Tensor:
        """Returns the norm as a tensor of its own, without waiting for the device."""
        if self.tensors is not None:
            return self.tensors[2 if wide else 1]
        return torch.tensor(norm, dtype=torch.float64 if wide else torch.float32, device="cpu")

    def nonfinite(self, count: int) -> int:
        """Returns the number of non-finite elements, which waits for the device."""
        return count if self.tensors is None else self.outcome.read().nonfinite
