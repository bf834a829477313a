"""The limits and penalties of all param groups: read and set at once, and compared with those of a checkpoint."""

from __future__ import annotations

import warnings
from typing import Any

from steadygrad.arguments import as_float
from steadygrad.optim.options import LIMITS, StabilizerOptions, checked_limit
from steadygrad.policies.adaptive import CLIPPING

Groups = list[dict[str, Any]]


class SettableLimits:
    """``opt.max_norm = 0.5`` sets the key of every param group; groups that are added later get the value set last.

    Reading gives the value that all groups have in common.

    Raises:
        TypeError: a value is no number.
        ValueError: a value is negative or NaN, or infinite for a penalty; on reading, the groups differ.
    """

    _options: StabilizerOptions
    param_groups: Groups

    def _genuine(self) -> Any:
        raise NotImplementedError

    @property
    def max_norm(self) -> float | None:
        """Limit of the gradient norm, None for none; beside ``clip`` a cap on what the policy allows."""
        limit: float | None = self._common("max_norm")
        return limit

    @max_norm.setter
    def max_norm(self, value: float | None) -> None:
        self._set("max_norm", value)

    @property
    def clip_value(self) -> float | None:
        """Limit of every element after the norm's clip, None for none."""
        limit: float | None = self._common("clip_value")
        return limit

    @clip_value.setter
    def clip_value(self, value: float | None) -> None:
        self._set("clip_value", value)

    @property
    def l1(self) -> float:
        """Weight of the L1 penalty."""
        l1: float = self._common("l1")
        return l1

    @l1.setter
    def l1(self, value: float) -> None:
        self._set("l1", value)

    @property
    def l2(self) -> float:
        """Weight of the L2 penalty."""
        l2: float = self._common("l2")
        return l2

    @l2.setter
    def l2(self, value: float) -> None:
        self._set("l2", value)

    def _common(self, key: str) -> Any:
        default = getattr(self._genuine()._options, key)
        values = [as_float(group.get(key, default)) for group in self.param_groups]
        if any(value != values[0] for value in values):
            # Not an AttributeError: a Stabilizer would look for the name on the optimizer that it wraps.
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
    """Makes the limits that were set in param groups Python's numbers, so that every file can hold them."""
    for group in groups:
        for key in (*LIMITS, CLIPPING):
            if key in group:
                group[key] = as_float(group[key])


def warn_of_other_limits(asked: Groups, groups: Groups) -> None:
    """Warns, once, where limits that were loaded are others than those that the optimizer had.

    Args:
        asked: of each param group the keys that it had before loading.
        groups: the param groups after it.
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
            f"load_state_dict: the checkpoint's limits hold from here on ({'; '.join(found)}). To go on with those "
            f"asked for, set them after loading: {'; '.join(remedies)}",
            stacklevel=4,
        )
