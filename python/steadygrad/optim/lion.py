"""Lion, which ``torch.optim`` does not have, in torch's operations: the fused rule is compared with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT


class Lion(torch.optim.Optimizer):
    r"""Moves every element by the learning rate, in the direction of an average of gradients (Lion).

    .. math:: p \leftarrow p (1 - \text{lr} \cdot \text{weight\_decay})
        - \text{lr} \cdot \operatorname{sign}(\beta_1 m + (1 - \beta_1) g), \quad
        m \leftarrow \beta_2 m + (1 - \beta_2) g

    Source: Chen et al. 2023, "Symbolic discovery of optimization algorithms", program 1.

    Args:
        params: Parameters or param groups.
        lr: Learning rate, at least 0; use three to ten times less than for AdamW. Default: 1e-4.
        betas: :math:`\beta_1` and :math:`\beta_2`, in [0, 1). Default: (0.9, 0.99).
        weight_decay: Decoupled weight decay, at least 0; use three to ten times more than for AdamW. Default: 0.
        maximize: Whether to maximize instead of minimize. Default: False.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"Lion: {name}: expected a number >= 0, got {value!r}")
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"Lion: betas[{i}]: expected a number in [0, 1), got {beta!r}")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step and returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                grad = -param.grad if group["maximize"] else param.grad
                state = self.state[param]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                exp_avg = state["exp_avg"]
                update = (exp_avg * beta1).add_(grad, alpha=1 - beta1).sgn_()
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.sub_(update * group["lr"])
                exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)
        return loss
