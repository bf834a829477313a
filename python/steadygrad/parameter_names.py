"""Names of parameters in param groups, for messages, reports and plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy


def _places(group_index: int, count: int) -> list[str]:
    return [f"param_groups[{group_index}]['params'][{i}]" for i in range(count)]


def parameter_names(param_groups: list[dict[str, Any]]) -> tuple[str, ...]:
    """Returns a different name for every parameter: from the ``param_names`` of its group, or its place."""
    names: list[str] = []
    for g, group in enumerate(param_groups):
        places = _places(g, len(group["params"]))
        given = group.get("param_names") or []
        names += given if len(given) == len(places) else places
    if len(set(names)) == len(names):
        return tuple(names)
    counts = Counter(names)
    places = [p for g, group in enumerate(param_groups) for p in _places(g, len(group["params"]))]
    return tuple(
        name if counts[name] == 1 else f"{name} ({place})"
        for name, place in zip(names, places, strict=True)
    )


def named_alike(param_groups: list[dict[str, Any]], added: dict[str, Any]) -> dict[str, Any]:
    """Gives the parameters of a new group names if the other groups have names, since torch takes all or none."""
    params = added.get("params")
    if not param_groups or "param_names" not in param_groups[0] or "param_names" in added:
        return added
    if isinstance(params, Tensor):
        params = [params]
    if isinstance(params, (list, tuple)) and all(isinstance(p, Tensor) for p in params):
        added["params"] = list(zip(_places(len(param_groups), len(params)), params, strict=True))
    return added


def set_parameter_names(
    param_groups: list[dict[str, Any]], named: Iterable[tuple[str, Tensor]]
) -> None:
    """Sets every group's ``param_names``, as torch does for an optimizer that is made from named parameters.

    Raises:
        ValueError: A parameter has no name, or shares its name with another. Then nothing is set.
    """
    names = {id(param): name for name, param in named}
    used = Counter(
        names[id(p)] for group in param_groups for p in group["params"] if id(p) in names
    )
    twice = [name for name, count in used.items() if count > 1]
    if twice:
        raise ValueError(
            f"name_parameters: named_parameters: expected another name for each parameter, got {twice[0]!r} for "
            f"{used[twice[0]]} of them"
        )
    nameless = [
        f"param_groups[{g}]['params'][{i}] of "
        + ("no shape yet" if is_lazy(param) else f"shape {tuple(param.shape)}")
        for g, group in enumerate(param_groups)
        for i, param in enumerate(group["params"])
        if id(param) not in names
    ]
    if nameless:
        count = sum(len(group["params"]) for group in param_groups)
        shown = ", ".join(nameless[:3]) + (", ..." if len(nameless) > 3 else "")
        raise ValueError(
            f"name_parameters: named_parameters: expected a name for each of the optimizer's {count} parameters, got "
            f"none for {len(nameless)}: {shown}. Pass model.named_parameters() of the model whose parameters are "
            "optimized, after it was moved, wrapped or sharded"
        )
    for group in param_groups:
        group["param_names"] = [names[id(param)] for param in group["params"]]
