"""The usual two param groups: weights that are penalised, and those that should not be."""

from __future__ import annotations

from typing import Any

from torch import nn

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
    """
    given = {"l1": l1, "l2": l2, "weight_decay": weight_decay}
    options = {key: value for key, value in given.items() if value is not None}
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
