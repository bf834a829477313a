"""What becomes of the bits of an update that a half-precision parameter cannot hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steadygrad import _kernels
from steadygrad.arguments import checked_count

Rounding = Literal["nearest", "stochastic", "kahan", "master"]

HALF_DTYPES = (torch.bfloat16, torch.float16)
# Steps taken with stochastic rounding: a key of every param group then, and what its random bits start from.
ROUNDED_STEPS = _kernels.ROUNDED_STEPS
# What the state keeps beside a half-precision parameter, by rounding.
_EXTRAS = {"master": "master_param", "kahan": "kahan_compensation"}


@dataclass(frozen=True)
class ParamStorage:
    """How half-precision parameters and their state are stored; all others are left alone."""

    state_dtype: torch.dtype | None
    rounding: Rounding
    rounding_seed: int

    def check(self) -> None:
        """Refuses values that no optimizer can take; the rounding's name is checked with the other choices."""
        if self.state_dtype not in (None, torch.float32):
            raise ValueError(
                f"Stabilizer: state_dtype: expected None or torch.float32, got {self.state_dtype!r}"
            )
        expected = "Stabilizer: rounding_seed: expected an int in [0, 2**64), got "
        if not isinstance(self.rounding_seed, int) or isinstance(self.rounding_seed, bool):
            raise TypeError(f"{expected}{self.rounding_seed!r}")
        if not 0 <= self.rounding_seed < 2**64:
            raise ValueError(f"{expected}{self.rounding_seed!r}")

    @property
    def is_stochastic(self) -> bool:
        """Whether steps are counted for random bits."""
        return self.rounding == "stochastic"

    def rounded_steps(self, param_groups: list[dict[str, Any]]) -> int:
        """Steps taken with stochastic rounding, as far as the param groups say."""
        if not param_groups:
            return 0
        where = f"step: param_groups[0][{ROUNDED_STEPS!r}]"
        return checked_count(where, param_groups[0].get(ROUNDED_STEPS, 0))

    def extra_name(self, param: Tensor) -> str | None:
        """The state's key for what is kept beside this parameter, or None."""
        return _EXTRAS.get(self.rounding) if param.dtype in HALF_DTYPES else None

    def new_extra(self, param: Tensor) -> Tensor:
        """The same while nothing has been lost: the parameter in float32, or no compensation."""
        if self.rounding == "master":
            return param.detach().to(torch.float32, copy=True)
        return torch.zeros_like(param).detach()

    def is_extra(self, value: Any, param: Tensor) -> bool:
        """Whether a state's entry is one. Loading a master copy, torch rounds it to the parameter."""
        dtype = torch.float32 if self.rounding == "master" else param.dtype
        return isinstance(value, Tensor) and value.dtype == dtype

    def dtype_for(self, param: Tensor) -> torch.dtype:
        """The dtype of a parameter's state."""
        return self.state_dtype or param.dtype if param.dtype in HALF_DTYPES else param.dtype

    def check_fits(self, params: list[Tensor], why_in_place: str | None) -> None:
        """Refuses what a step with these parameters cannot do; ``why_in_place`` is None on the fused path.

        Raises:
            ValueError: another ``rounding`` or ``state_dtype`` than torch's on the in-place path, or master copies of
                fp64 parameters.
        """
        asked = {"rounding": (self.rounding, "nearest"), "state_dtype": (self.state_dtype, None)}
        for name, (value, default) in asked.items():
            if why_in_place is not None and value != default:
                raise ValueError(
                    f"step: {name}: expected {default!r} where the update is the wrapped optimizer's own "
                    f"({why_in_place}), got {value!r}"
                )
        for i, param in enumerate(params if self.rounding == "master" else []):
            if param.dtype == torch.float64:
                raise ValueError(
                    f"step: parameters[{i}]: expected float32, bfloat16 or float16 for rounding='master' "
                    "(a master copy is float32), got float64"
                )
