"""Param groups: the usual two, weights that are penalised and those that should not be; and the names in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from steadygrad.arguments import as_float

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
    """Splits a model's trainable parameters into two param groups: penalised weights, and the rest.

    The second group holds biases, the parameters of normalization layers, and everything with fewer than two
    dimensions (scales, gains); it gets 0 for each option given here.

    Args:
        model: any module; parameters with ``requires_grad=False`` are left out, tied ones appear once.
        l1: ``l1`` of the first group; None leaves the key out, so that the optimizer's default holds for both.
        l2: likewise.
        weight_decay: likewise; the wrapped optimizer's own decay.

    Returns:
        ``[penalised, rest]``, each with ``params``, ``param_names`` and the options given; either may be empty.

    Raises:
        ValueError: a parameter of a lazy module is not initialized yet, so its dimensions are not known.
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
                f"param_groups: model: expected initialized parameters, got an {type(param).__name__} in {name!r}, of "
                "a lazy module; run a batch through the model first"
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


def _places(group_index: int, count: int) -> list[str]:
    return [f"param_groups[{group_index}]['params'][{i}]" for i in range(count)]


def parameter_names(param_groups: list[dict[str, Any]]) -> tuple[str, ...]:
    """Of all parameters, in order, each another: torch's ``param_names`` of each group, or their places."""
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
    """A group that is to be added, with places for names where the others have names: torch takes all or none."""
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
    """Sets every group's ``param_names``, as torch does where an optimizer is made from named parameters.

    Raises:
        ValueError: a parameter has no name, or one that another has, too; then nothing is set.
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
            f"none for {len(nameless)}: {shown}. Pass those of the model whose parameters are optimized, after it was "
            "moved, wrapped or sharded"
        )
    for group in param_groups:
        group["param_names"] = [names[id(param)] for param in group["params"]]
