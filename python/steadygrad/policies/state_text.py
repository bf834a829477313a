"""Converts a policy's state to text, which compares equal to itself and fits into any format of checkpoints."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

# A dict with this key stands for a tensor.
_TENSOR = "__tensor__"


def text_of(where: str, state: object) -> str:
    """Returns the state as JSON with infinities and NaN; a tensor becomes its dtype, shape and values, after a wait.

    Raises:
        TypeError: A value is neither a number, string, boolean, None or real dense tensor, nor a list or dict of them.
    """
    if not isinstance(state, dict):
        raise TypeError(f"{where}: expected a dict, got {state!r}")
    return json.dumps(_plain(where, "state", state))


def state_of(text: str, device: torch.device) -> dict[str, Any]:
    """Returns the state that the text was made from, with its tensors on ``device``.

    Raises:
        ValueError, TypeError, AttributeError or RuntimeError: The text is not such a state.
    """
    state: object = json.loads(text, object_hook=lambda entry: _with_tensor(entry, device))
    if not isinstance(state, dict):
        raise TypeError(f"expected a dict, got {type(state).__name__}")
    return state


def _plain(where: str, name: str, value: object) -> object:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor) and _has_real_values(value):
        dtype = str(value.dtype).removeprefix("torch.")
        return {_TENSOR: [dtype, list(value.shape), value.detach().reshape(-1).tolist()]}
    if isinstance(value, (list, tuple)):
        return [_plain(where, f"{name}[{i}]", entry) for i, entry in enumerate(value)]
    if (
        isinstance(value, dict)
        and all(isinstance(key, str) for key in value)
        and _TENSOR not in value
    ):
        return {key: _plain(where, f"{name}[{key!r}]", entry) for key, entry in value.items()}
    got = type(value).__name__
    if isinstance(value, Tensor):
        got = f"a {value.layout} {value.dtype} tensor on {value.device}"
    raise TypeError(
        f"{where}: {name}: expected a number, a string, a boolean, None, a real dense tensor, or a list or dict (with "
        f"strings as keys) of them, got {got}; leave it out of state_dict()"
    )


def _has_real_values(tensor: Tensor) -> bool:
    is_dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    return is_dense and not tensor.is_complex()


def _with_tensor(entry: dict[str, Any], device: torch.device) -> Any:
    if _TENSOR not in entry:
        return entry
    dtype, shape, values = entry[_TENSOR]
    return torch.tensor(values, dtype=getattr(torch, dtype), device=device).reshape(shape)
