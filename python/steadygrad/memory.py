"""Memory that kernels fill: what a call leaves behind, and scratch space on the tensors' device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steadygrad import _kernels


def is_asynchronous(device: torch.device) -> bool:
    """Whether kernels for tensors on this device run behind the host's back, so that results must stay there."""
    if not _kernels.is_asynchronous(device.type):
        return False
    # What torch for ROCm calls "cuda" is not what kernels for CUDA run on.
    return device.type != "cuda" or torch.version.hip is None


def keep_for_graphs(kept: list[Tensor], *replaced: Tensor) -> None:
    """Keeps tensors that captured graphs may go on with; none on the CPU, where no step is captured."""
    kept += [tensor for tensor in replaced if is_asynchronous(tensor.device)]


def is_number_on(value: Any, device: torch.device | None) -> bool:
    """Whether it is a number in a tensor on an asynchronous device, which kernels can read without a wait."""
    return (
        device is not None
        and isinstance(value, Tensor)
        and value.device == device
        and value.numel() == 1
        and value.dtype in (torch.float32, torch.float64)
        and is_asynchronous(device)
    )


def allocator(device: torch.device | None) -> Callable[[int], Tensor]:
    """A function that makes so many bytes of scratch space; never called for the CPU's kernels, None."""
    return lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=device)


class Outcome:
    """What a norm, a clip or a step leaves on an asynchronous device; :class:`_kernels.Outcome` is that of the host.

    Until it is read it says that nothing happened: the device keeps the counts.
    """

    skipped = refused = clipped = False

    def __init__(self, device: torch.device) -> None:
        self.record = torch.empty(_kernels.OUTCOME_BYTES // 8, dtype=torch.float64, device=device)

    def _part(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.record.view(dtype)[_kernels.OUTCOME_OFFSETS[name] // dtype.itemsize]

    def norm(self, wide: bool) -> Tensor:
        """The norm, 0-d, without waiting: float64 or float32."""
        part = ("norm", torch.float64) if wide else ("norm_float32", torch.float32)
        return self._part(*part).clone()

    def found_nonfinite(self) -> Tensor:
        """1.0 if there were non-finite elements or the step was skipped for such, else 0.0, without waiting."""
        skipped, spiked = (self._part(name, torch.uint8) for name in ("skipped", "spiked"))
        return ((self._part("nonfinite", torch.int64) > 0) | (skipped > spiked)).float()

    def read(self) -> _kernels.Outcome:
        """Copies the outcome to the host; waits for the device."""
        return _kernels.Outcome(self.record.cpu())


class NormOutput:
    """Where kernels put the norm that a function returns; on the CPU they return it."""

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
        """The norm as a tensor of its own, without waiting."""
        if self.tensors is not None:
            return self.tensors[2 if wide else 1]
        return torch.tensor(norm, dtype=torch.float64 if wide else torch.float32, device="cpu")

    def nonfinite(self, count: int) -> int:
        """The number of non-finite elements; waits for the device."""
        return count if self.tensors is None else self.outcome.read().nonfinite
