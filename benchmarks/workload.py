"""Parameters and gradients that one candidate works on, and the limit that keeps its clip on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.shapes import ModelShapes

# Every call lowers the limit by this factor, so a clip stays active without restoring gradients;
# 10,000 calls leave a 20,000th of their size, far from denormal numbers.
_LIMIT_DECAY = 0.999


class Workload:
    """fp32 parameters with standard normal gradients, each tensor its own allocation as in a model.

    Every candidate gets a workload of its own with the same numbers: it starts with cold buffers,
    and what one candidate writes never changes the work of another.
    """

    def __init__(
        self,
        model: ModelShapes,
        *,
        params: bool = True,
        grads: bool = True,
        clip_active: bool = True,
        device: torch.device | None = None,
    ) -> None:
        """Draw the numbers.

        Args:
            model: the shapes.
            params: draw the parameters; otherwise their memory is reserved and never touched.
            grads: draw the gradients; otherwise the parameters have none.
            clip_active: start with a limit of half the gradients' norm, which `tighten` lowers;
                otherwise the limit is twice the norm and stays.
            device: where the tensors live; the CPU by default.
        """
        self.device = device or torch.device("cpu")
        generator = torch.Generator(self.device).manual_seed(0)
        self.clip_active = clip_active
        # The norm of n standard normal numbers is sqrt(n) within a fraction of a per cent.
        self._norm = math.sqrt(model.elements)
        self.fraction = 0.5 if clip_active else 2.0
        self.params: list[torch.nn.Parameter] = []
        for shape in model.shapes:
            grad = self._normal(shape, generator) if grads else None
            values = (
                self._normal(shape, generator) if params else torch.empty(shape, device=self.device)
            )
            param = torch.nn.Parameter(values)
            param.grad = grad
            self.params.append(param)

    def _normal(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=self.device)

    @property
    def grads(self) -> list[Tensor]:
        """The gradients, in the order of the parameters."""
        return [param.grad for param in self.params if param.grad is not None]

    @property
    def limit(self) -> float:
        """`max_norm` for the coming call."""
        return self.fraction * self._norm

    def tighten(self) -> None:
        """Lower the limit below the norm that the last clip left, if the clip is to stay on."""
        if self.clip_active:
            self.fraction *= _LIMIT_DECAY
