"""The options of a stabilized step, checked when they are made and at each step."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor

from steadygrad import _kernels
from steadygrad.arguments import as_int, checked_count
from steadygrad.arguments import checked_number as checked_number
from steadygrad.policies import (
    ClipAdaptive,
    ClipNorm,
    ClipPolicy,
    KernelPolicy,
    SkipSpikes,
)
from steadygrad.policies.adaptive import CLIPPING
from steadygrad.policies.policy_state import CLIP_STATE, SKIP_STATE, PolicyStates
from steadygrad.telemetry.recorder import RECORDED_STEPS
from steadygrad.telemetry.settings import Level, Telemetry, telemetry_settings

Rounding = Literal["nearest", "stochastic", "kahan", "master"]

HALF_DTYPES = (torch.bfloat16, torch.float16)
# A key of every param group with stochastic rounding: the number of such steps, from which the random bits derive.
ROUNDED_STEPS = _kernels.ROUNDED_STEPS
# The state's key for what is kept beside a half-precision parameter, by rounding.
_EXTRAS = {"master": "master_param", "kahan": "kahan_compensation"}


@dataclass(frozen=True)
class ParamStorage:
    """Says how half-precision parameters and their state are stored; all others are stored as usual."""

    state_dtype: torch.dtype | None
    rounding: Rounding
    rounding_seed: int

    def check(self) -> None:
        """Refuses values that no optimizer takes; the name of the rounding is checked with the other choices."""
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
        """Returns whether steps are counted for random bits."""
        return self.rounding == "stochastic"

    def rounded_steps(self, param_groups: list[dict[str, Any]]) -> int:
        """Returns the number of steps with stochastic rounding that the param groups hold."""
        if not param_groups:
            return 0
        where = f"step: param_groups[0][{ROUNDED_STEPS!r}]"
        return checked_count(where, param_groups[0].get(ROUNDED_STEPS, 0))

    def extra_name(self, param: Tensor) -> str | None:
        """Returns the state's key for what is kept beside this parameter, or None."""
        return _EXTRAS.get(self.rounding) if param.dtype in HALF_DTYPES else None

    def new_extra(self, param: Tensor) -> Tensor:
        """Makes what is kept beside a parameter without rounding errors: a float32 copy, or a compensation of 0."""
        if self.rounding == "master":
            return param.detach().to(torch.float32, copy=True)
        return torch.zeros_like(param).detach()

    def is_extra(self, value: Any, param: Tensor) -> bool:
        """Returns whether a state's entry is valid; torch's loading rounds a master copy to the parameter's dtype."""
        dtype = torch.float32 if self.rounding == "master" else param.dtype
        return isinstance(value, Tensor) and value.dtype == dtype

    def dtype_for(self, param: Tensor) -> torch.dtype:
        """Returns the dtype of a parameter's state."""
        return self.state_dtype or param.dtype if param.dtype in HALF_DTYPES else param.dtype

    def check_fits(
        self, params: list[Tensor], why_in_place: str | None, function: str = "step"
    ) -> None:
        """Refuses storage that a step with these parameters cannot do; ``why_in_place`` is None on the fused path.

        Raises:
            ValueError: On the in-place path ``rounding`` or ``state_dtype`` differs from torch's, or fp64 parameters
                would have master copies.
        """
        asked = {"rounding": (self.rounding, "nearest"), "state_dtype": (self.state_dtype, None)}
        for name, (value, default) in asked.items():
            if why_in_place is not None and value != default:
                raise ValueError(
                    f"{function}: {name}: expected {default!r} if the wrapped optimizer does the update itself "
                    f"({why_in_place}), got {value!r}"
                )
        for i, param in enumerate(params if self.rounding == "master" else []):
            if param.dtype == torch.float64:
                raise ValueError(
                    f"step: parameters[{i}]: expected float32, bfloat16 or float16 for rounding='master' "
                    "(a master copy is float32), got float64"
                )


PenaltyOrder = Literal["before_clip", "after_clip"]
L1Mode = Literal["subgradient", "proximal"]
ClipScope = Literal["global", "group", "tensor"]
Nonfinite = Literal["skip", "zero", "raise", "propagate"]

# The attribute that holds a Python policy's first state, for every copy of the options and every stepper.
_FRESH = "_fresh"

COUNTERS = _kernels.COUNTERS

# Keys of every param group that can also be set for all groups at once. The first two may be None, for no limit.
LIMITS = _kernels.LIMITS

# Keys that describe the whole optimizer. Every param group has the same values, so that any group may be removed.
SHARED_KEYS = (*COUNTERS, ROUNDED_STEPS, RECORDED_STEPS, CLIP_STATE, SKIP_STATE)


def checked_limit(where: str, key: str, value: Any) -> float | None:
    """Converts a value for one of ``LIMITS`` to a float or None, or raises an error that says what was expected."""
    may_be_none = key in ("max_norm", "clip_value")
    if value is None and may_be_none:
        return None
    return checked_number(where + key, value, finite=not may_be_none)


def _checked_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"Stabilizer: {name}: expected one of {listed}, got {value!r}")


class StabilizerKeywords(TypedDict, total=False):
    """Tells type checkers the keyword arguments of :class:`StabilizerOptions` that a constructor passes on."""

    max_norm: float | None
    clip: ClipPolicy | None
    skip: SkipSpikes | None
    norm_type: float
    clip_value: float | None
    l1: float
    l2: float
    penalty_order: PenaltyOrder
    l1_mode: L1Mode
    clip_scope: ClipScope | None
    nonfinite: Nonfinite
    write_grads: bool
    state_dtype: torch.dtype | None
    rounding: Rounding
    rounding_seed: int
    reduce_norm: Any
    telemetry: Telemetry | Level | None


@dataclass(frozen=True)
class StabilizerOptions:
    """Holds and checks the keyword arguments of :class:`steadygrad.Stabilizer`, which documents them."""

    max_norm: float | None = None
    clip: ClipPolicy | None = None
    skip: SkipSpikes | None = None
    norm_type: float = 2.0
    clip_value: float | None = None
    l1: float = 0.0
    l2: float = 0.0
    penalty_order: PenaltyOrder = "before_clip"
    l1_mode: L1Mode = "subgradient"
    clip_scope: ClipScope | None = None
    nonfinite: Nonfinite = "skip"
    write_grads: bool = False
    state_dtype: torch.dtype | None = None
    rounding: Rounding = "nearest"
    rounding_seed: int = 0
    reduce_norm: Any = None
    telemetry: Telemetry | Level | None = "tensor"

    def __deepcopy__(self, memo: dict[int, Any]) -> StabilizerOptions:
        """Copies only what has a state, a Python policy and telemetry's writers; process groups cannot be copied."""
        own: dict[str, Any] = {}
        if not isinstance(self.clip, (KernelPolicy, type(None))):
            own["clip"] = copy.deepcopy(self.clip, memo)
        if self.telemetry is not None:
            own["telemetry"] = copy.copy(self.telemetry)
        return self.changed(**own) if own else self

    def changed(self, **options: Any) -> StabilizerOptions:
        """Returns a copy with other, checked options."""
        copied = copy.copy(self)
        vars(copied).update(options)
        return copied

    def __post_init__(self) -> None:
        """Checks every option, and converts numbers to Python's, which every format of checkpoints can hold."""
        if self.clip is not None:
            self._check_clip()
        if not isinstance(self.skip, (SkipSpikes, type(None))):
            raise TypeError(f"Stabilizer: skip: expected a SkipSpikes or None, got {self.skip!r}")
        own = vars(self)
        if isinstance(self.clip, ClipNorm):
            own.update(max_norm=self.clip.max_norm, clip=None)
        for key in LIMITS:
            own[key] = checked_limit("Stabilizer: ", key, own[key])
        own["norm_type"] = checked_number("Stabilizer: norm_type", self.norm_type, finite=False)
        own["rounding_seed"] = as_int(self.rounding_seed)
        if self.norm_type == 0:
            raise ValueError(
                "Stabilizer: norm_type: expected a number > 0: counting non-zeros limits nothing, "
                f"got {self.norm_type!r}"
            )
        _checked_choice("penalty_order", self.penalty_order, get_args(PenaltyOrder))
        _checked_choice("l1_mode", self.l1_mode, get_args(L1Mode))
        _checked_choice("clip_scope", self.scope, get_args(ClipScope))
        _checked_choice("nonfinite", self.nonfinite, get_args(Nonfinite))
        _checked_choice("rounding", self.rounding, get_args(Rounding))
        self.storage.check()
        object.__setattr__(self, "telemetry", telemetry_settings(self.telemetry))

    def _check_clip(self) -> None:
        if not isinstance(self.clip, ClipPolicy):
            raise TypeError(
                f"Stabilizer: clip: expected a clip policy such as ClipPercentile(), got {self.clip!r}"
            )
        if isinstance(self.clip, ClipNorm) and self.max_norm is not None:
            raise ValueError(
                f"Stabilizer: clip: expected a policy that finds a limit, since max_norm={self.max_norm!r} is given, "
                f"got {self.clip!r}, which is a constant limit too"
            )

    @property
    def scope(self) -> ClipScope:
        """Returns the scope of a limit; the clip policy chooses it if the user has not."""
        if self.clip_scope is not None:
            return self.clip_scope
        return "global" if self.clip is None else self.clip.default_scope

    @property
    def telemetry_level(self) -> Level | None:
        """Returns the level of telemetry, or None."""
        return self.telemetry.level if isinstance(self.telemetry, Telemetry) else None

    @property
    def per_tensor(self) -> bool:
        """Returns whether the step computes the norm of every tensor over all ranks."""
        return self.scope == "tensor" or self.telemetry_level == "tensor"

    @property
    def unit_clipping(self) -> float | None:
        """Returns the ``clipping`` of param groups without that key, or None if output units are not clipped."""
        return self.clip.clipping if isinstance(self.clip, ClipAdaptive) else None

    def shown(self, name: str) -> str:
        """Returns an option as it is written; for a Python policy its name, since its repr may differ between ranks."""
        option = getattr(self, name)
        if name == "clip" and not isinstance(option, (KernelPolicy, type(None))):
            return type(option).__name__
        return repr(option)

    def policy_states(self) -> PolicyStates:
        """Returns new, empty states of the policies."""
        fresh = vars(self).get(_FRESH)
        states = PolicyStates(self.clip, self.skip, self.scope, self.per_tensor, fresh)
        vars(self)[_FRESH] = states.fresh
        return states

    def group_defaults(self) -> dict[str, Any]:
        """Returns the keys that every param group has, so that they can differ per group and be saved."""
        return {
            **self.limits(),
            **dict.fromkeys(COUNTERS, 0),
            **({ROUNDED_STEPS: 0} if self.storage.is_stochastic else {}),
            **({RECORDED_STEPS: 0} if self.telemetry is not None else {}),
            **self.learnt_defaults(),
        }

    def learnt_defaults(self) -> dict[str, None]:
        """Returns the keys for what policies have learnt."""
        learns = self.clip is not None and self.clip.for_kernels is not None
        return {
            **({CLIP_STATE: None} if learns else {}),
            **({SKIP_STATE: None} if self.skip is not None else {}),
        }

    def clips_units(self, group: Mapping[str, Any]) -> bool:
        """Returns whether the gradients of this param group are clipped by output unit."""
        if self.unit_clipping is None:
            return False
        clipping = group.get(CLIPPING, self.unit_clipping)
        return clipping is not None and float(clipping) != math.inf

    def limits(self) -> dict[str, float | None]:
        """Returns the limits and penalties of a param group that has none of its own."""
        limits = {key: getattr(self, key) for key in LIMITS}
        return limits if self.unit_clipping is None else {**limits, CLIPPING: self.unit_clipping}

    def kernel_options(self) -> dict[str, object]:
        """Returns the options that stay the same from step to step, for a plan."""
        return {
            "norm_type": self.norm_type,
            "clip_scope": self.scope,
            "nonfinite": self.nonfinite,
            "penalty_order": self.penalty_order,
            "l1_mode": self.l1_mode,
            "write_grads": bool(self.write_grads),
            "rounding": self.rounding,
            "rounding_seed": self.rounding_seed,
            "per_tensor": self.per_tensor,
            "clip_policy": None if self.clip is None else self.clip.for_kernels,
            "skip_policy": None if self.skip is None else self.skip.for_kernels,
        }

    @property
    def storage(self) -> ParamStorage:
        """Returns how half-precision parameters and their state are stored."""
        return ParamStorage(self.state_dtype, self.rounding, self.rounding_seed)
