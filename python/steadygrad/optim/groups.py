"""Param groups: the usual two, limits that can be set for all of them at once, and checks of loaded ones."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from steadygrad.arguments import as_float, checked_count
from steadygrad.optim.options import (
    COUNTERS,
    LIMITS,
    ROUNDED_STEPS,
    StabilizerOptions,
    checked_limit,
)
from steadygrad.policies.adaptive import CLIPPING
from steadygrad.policies.policy_state import PolicyStates
from steadygrad.telemetry.recorder import RECORDED_STEPS

_NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


def param_groups(
    model: nn.Module,
    l1: float | None = None,
    l2: float | None = None,
    weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Splits a model's trainable parameters into two param groups: weights to penalise, and the rest.

    The second group holds biases, the parameters of normalization layers, and everything with fewer than two
    dimensions (scales, gains). It gets 0 for each option given here.

    Args:
        model: Any module. Parameters with ``requires_grad=False`` are left out, and tied ones appear once.
        l1: The ``l1`` of the first group. None leaves the key out, so that both groups get the optimizer's default.
            Default: None.
        l2: The ``l2`` of the first group, likewise. Default: None.
        weight_decay: The wrapped optimizer's own weight decay of the first group, likewise. Default: None.

    Returns:
        ``[penalised, rest]``, each with ``params``, ``param_names`` and the given options; either may be empty.

    Raises:
        ValueError: A parameter of a lazy module is not initialized yet, so its dimensions are not known.
    """
    given = {"l1": l1, "l2": l2, "weight_decay": weight_decay}
    options = {key: as_float(value) for key, value in given.items() if value is not None}
    exempt_ids = {
        id(param)
        for module in model.modules()
        if isinstance(module, _NORM_LAYERS)
        for param in module.parameters(recurse=False)
    }
    penalised: list[tuple[str, nn.Parameter]] = []
    rest: list[tuple[str, nn.Parameter]] = []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if is_lazy(param):
            raise ValueError(
                f"param_groups: model: expected initialized parameters, got an {type(param).__name__} at {name!r}, "
                "which belongs to a lazy module; run a batch through the model first"
            )
        is_bias = name.rsplit(".", 1)[-1].endswith("bias")
        exempt = is_bias or param.ndim < 2 or id(param) in exempt_ids
        (rest if exempt else penalised).append((name, param))
    return [
        {
            "params": [param for _, param in named],
            "param_names": [name for name, _ in named],
            **values,
        }
        for named, values in ((penalised, options), (rest, dict.fromkeys(options, 0.0)))
    ]


Groups = list[dict[str, Any]]


class SettableLimits:
    """Lets the limits of all param groups be set at once: ``opt.max_norm = 0.5``.

    Setting a limit sets the key of every param group, and groups that are added later get the value set last. Reading
    gives the value that all groups have in common.

    Raises:
        TypeError: A value is not a number.
        ValueError: A value is negative or NaN, or infinite for a penalty; when reading, the groups differ.
    """

    _options: StabilizerOptions
    param_groups: Groups

    def _genuine(self) -> Any:
        raise NotImplementedError

    @property
    def max_norm(self) -> float | None:
        """The limit of the gradient norm; None for no limit. With ``clip`` it caps the limits of the policy."""
        limit: float | None = self._common("max_norm")
        return limit

    @max_norm.setter
    def max_norm(self, value: float | None) -> None:
        self._set("max_norm", value)

    @property
    def clip_value(self) -> float | None:
        """The limit of every element, after the clip by the norm; None for no limit."""
        limit: float | None = self._common("clip_value")
        return limit

    @clip_value.setter
    def clip_value(self, value: float | None) -> None:
        self._set("clip_value", value)

    @property
    def l1(self) -> float:
        """The weight of the L1 penalty."""
        l1: float = self._common("l1")
        return l1

    @l1.setter
    def l1(self, value: float) -> None:
        self._set("l1", value)

    @property
    def l2(self) -> float:
        """The weight of the L2 penalty."""
        l2: float = self._common("l2")
        return l2

    @l2.setter
    def l2(self, value: float) -> None:
        self._set("l2", value)

    def _common(self, key: str) -> Any:
        default = getattr(self._genuine()._options, key)
        values = [as_float(group.get(key, default)) for group in self.param_groups]
        if any(value != values[0] for value in values):
            # With an AttributeError a Stabilizer would look for the name on the optimizer that it wraps.
            raise ValueError(
                f"{key}: expected one value in all param groups, got {', '.join(map(repr, values))}; read "
                f"param_groups[i][{key!r}], or set {key} for all of them"
            )
        return values[0] if values else default

    def _set(self, key: str, value: Any) -> None:
        genuine = self._genuine()
        number = checked_limit("Stabilizer: ", key, value)
        for group in self.param_groups:
            group[key] = number
        genuine._options = genuine._options.changed(**{key: number})
        stepper = genuine.__dict__.get("_stepper")
        if stepper is not None:
            stepper.set_limit(key, number, genuine._options)


def make_plain(groups: Groups) -> None:
    """Converts the limits in param groups to Python's numbers, so that every format of checkpoints can hold them."""
    for group in groups:
        for key in (*LIMITS, CLIPPING):
            if key in group:
                group[key] = as_float(group[key])


def warn_of_other_limits(asked: Groups, groups: Groups) -> None:
    """Warns once if loaded limits differ from those that the optimizer had before.

    Args:
        asked: For each param group, the keys that it had before loading.
        groups: The param groups after loading.
    """
    found: list[str] = []
    remedies: list[str] = []
    for key in (*LIMITS, CLIPPING):
        pairs = [
            (group.get(key), mine[key])
            for group, mine in zip(groups, asked, strict=True)
            if key in mine
        ]
        other = [i for i, (loaded, mine) in enumerate(pairs) if loaded != mine]
        alike = len(set(pairs)) == 1
        for i in other[:1] if alike else other:
            loaded, mine = pairs[i]
            where = key if alike else f"{key} of param_groups[{i}]"
            found.append(f"{where}: loaded {loaded!r}, asked for {mine!r}")
            settable = alike and key != CLIPPING
            target = key if settable else f"param_groups[{i}][{key!r}]"
            remedies.append(f"optimizer.{target} = {mine!r}")
    if found:
        warnings.warn(
            f"load_state_dict: the checkpoint's limits replace those of this optimizer ({'; '.join(found)}). To keep "
            f"this optimizer's, set them after loading: {'; '.join(remedies)}",
            stacklevel=4,
        )


# Larger step numbers are not exact as float64.
_MOST_STEPS = 2**53


def check_loaded(state_dict: dict[str, Any], options: StabilizerOptions) -> None:
    """Refuses a state dict with counters or policy states from which no step could continue.

    Args:
        state_dict: The state dict of an optimizer, stabilized or not; it may lack keys.
        options: The options of the optimizer that will load it.

    Raises:
        TypeError: A counter is not an int.
        ValueError: A counter is negative or too large, or a policy's state is malformed.
    """
    # "{}" stands for the state of a policy written in Python, which is not called here.
    # Nothing is asked of a policy in Python; "{}" stands in for the state that it has.
    policies = PolicyStates(options.clip, options.skip, options.scope, options.per_tensor, "{}")
    for i, group in enumerate(state_dict.get("param_groups", ())):
        for key in (*COUNTERS, ROUNDED_STEPS, RECORDED_STEPS):
            where = f"load_state_dict: param_groups[{i}][{key!r}]"
            steps = checked_count(where, group.get(key, 0))
            if steps >= _MOST_STEPS:
                raise ValueError(f"{where}: expected less than {_MOST_STEPS}, got {steps}")
        policies.check_loaded(group)
