"""The in-place path: why an optimizer takes it, how closures are called, and what happens around its own step."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from steadygrad import composite
from steadygrad.distributed.dtensors import local_tensor
from steadygrad.memory import is_asynchronous, is_number_on
from steadygrad.optim.options import StabilizerOptions, checked_number
from steadygrad.optim.state import UpdateRule
from steadygrad.penalty import soft_threshold_
from steadygrad.policies.adaptive import CLIPPING

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def why_not_fused(
    optimizer: torch.optim.Optimizer, rule: UpdateRule | None, bypasses_step: bool
) -> str | None:
    """Returns a short reason, or None if the fused path can step everything that this optimizer holds.

    ``bypasses_step`` tells whether fusing would pass over the optimizer's own ``step`` method.

    Raises:
        RuntimeError: A parameter is an inference tensor, which may not be updated.
    """
    params = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    for i, (param, _) in enumerate(params):
        if not is_lazy(param) and param.is_inference():
            raise RuntimeError(
                f"step: parameters[{i}]: expected a tensor that may be updated, got an inference "
                "tensor; create the model outside torch.inference_mode"
            )
    if rule is None:
        return f"no fused rule for {type(optimizer).__name__}"
    own_step = optimizer.__dict__.get("step")
    if bypasses_step and own_step is not None and not hasattr(own_step, "_wrapped_by_lr_sched"):
        return f"the step of this {type(optimizer).__name__} was replaced"
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            return "differentiable=True"
        if group.get("capturable") and not all(is_asynchronous(p.device) for p in group["params"]):
            return "capturable=True"
    no_kernel = composite.why_no_kernel(param for param, _ in params)
    names = {}
    if no_kernel is None:
        names = {id(group): rule.state_names(group) for group in optimizer.param_groups}
    seen: set[int] = set()
    for param, group in params:
        if is_lazy(param):
            continue  # It has no gradient yet; once it has one, this function is called again.
        local = local_tensor(param)
        why = _why_not_param(local, rule)
        # The address is 0 if there is no memory, or if it was freed, which the kernels refuse.
        address = 0 if why is not None or local.numel() == 0 else local.data_ptr()
        if address and address in seen:
            why = "a parameter appears twice, or two share memory"
        if why is None and no_kernel is None:
            why = _why_not_state(optimizer, param, rule, names[id(group)])
        if why is not None:
            return why
        seen.add(address)
    return no_kernel


def _why_not_param(param: Tensor, rule: UpdateRule) -> str | None:
    if type(param) not in (Tensor, torch.nn.Parameter):
        return f"a parameter is a {type(param).__name__}"
    if param.is_complex():
        return "complex parameters"
    if param.dtype not in _DTYPES:
        return f"{param.dtype} parameters"
    if param.layout != torch.strided:
        return f"{param.layout} parameters"
    if rule.takes_sparse and param.grad is not None and param.grad.is_sparse:
        return "sparse gradients"
    return None


def _why_not_state(
    optimizer: torch.optim.Optimizer, param: Tensor, rule: UpdateRule, names: tuple[str, ...]
) -> str | None:
    state = optimizer.state.get(param)
    if not state:
        return None
    for name in rule.number_names:
        if not isinstance(state.get(name), Tensor):
            return f"a state's '{name}' is not a tensor"
    for name in names:
        value = state.get(name)
        if value is None and name == "momentum_buffer" and not rule.has_step:
            continue
        if not isinstance(value, Tensor):
            return f"a state has no '{name}'"
    return None


Closure = Callable[[], Any]


def evaluates_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Tells whether the optimizer's step itself calls the closure, more than once, as LBFGS's, so that it needs one."""
    parameter = inspect.signature(type(optimizer).step).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def other_update_methods(optimizer: torch.optim.Optimizer) -> list[str]:
    """Returns methods like ``step`` that need no arguments, such as ``first_step`` and ``second_step`` of SAM."""
    kind = type(optimizer)
    names = [name for name in dir(kind) if name.endswith("_step") and not name.startswith("_")]
    return [
        name
        for name in names
        if not hasattr(torch.optim.Optimizer, name)
        and inspect.isfunction(getattr(kind, name))
        and _can_do_without_arguments(getattr(kind, name))
    ]


def _can_do_without_arguments(method: Callable[..., Any]) -> bool:
    # A method that needs arguments, such as ``update_step`` of bitsandbytes, is a part of the step.
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return all(p.kind in optional or p.default is not p.empty for p in parameters)


def evaluated(closure: Closure | None) -> Any:
    """Returns the closure's loss, evaluated with gradients enabled; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def snapshot(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Returns a function that puts the parameters and the state back as they are now."""
    params = [(p, p.detach().clone()) for g in optimizer.param_groups for p in g["params"]]
    state = {p: copy.deepcopy(values) for p, values in optimizer.state.items()}

    @torch.no_grad()
    def restore() -> None:
        for param, value in params:
            param.copy_(value)
        optimizer.state.clear()
        optimizer.state.update(state)

    return restore


def dense_grad(
    param: Tensor, group: dict[str, Any], options: StabilizerOptions, sums: dict[Tensor, Tensor]
) -> Tensor | None:
    """Returns the gradient, or accumulated sum, as kernels take it: for a sparse one, its values."""
    grad = sums.get(param, param.grad)
    if grad is None or not grad.is_sparse:
        return grad
    if options.clips_units(group):
        raise TypeError(
            "step: clip: ClipAdaptive: expected dense gradients, whose units are whole, got a sparse one of shape "
            f"{tuple(grad.shape)}. Put its parameter into a param group with {CLIPPING}=None, which leaves it out"
        )
    for key in ("l1", "l2"):
        if group.get(key, getattr(options, key)) != 0:
            raise ValueError(
                f"step: {key}: expected 0 where gradients are sparse (a penalty is dense), "
                f"got {group.get(key)}"
            )
    # Repeated indices must be summed before the norm can be computed.
    param.grad = grad.coalesce()
    return param.grad.values()


def check_own_numbers(
    optimizer: torch.optim.Optimizer,
    number: int,
    options: StabilizerOptions,
    device: torch.device | None,
) -> None:
    """Refuses numbers that would make parameters NaN, or that would raise an error only after the update.

    This is for optimizers without a fused rule.

    Args:
        optimizer: Optimizer whose defaults name its hyper-parameters.
        number: Index of the param group to check.
        options: Options of the step.
        device: The asynchronous device that the parameters are on, or None; numbers on it are not waited for.

    Raises:
        TypeError: A proximal step needs ``lr``, and it is not a number.
        ValueError: ``lr`` is negative or not finite, or another hyper-parameter is NaN.
    """
    group = optimizer.param_groups[number]
    where = f"step: param_groups[{number}]: "
    lr = group.get("lr")  # None if the optimizer chooses its rate itself
    shrinks = options.l1_mode == "proximal" and group.get("l1", options.l1) != 0
    needs_lr = shrinks or lr is not None or optimizer.defaults.get("lr") is not None
    if needs_lr and not is_number_on(lr, device):
        checked_number(where + "lr", lr)
    for key in optimizer.defaults:
        value = group.get(key)
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(part, float) and math.isnan(part):
                raise ValueError(f"{where}{key}: expected a number, got {value!r}")


def apply_proximal(
    param_groups: list[dict[str, Any]], options: StabilizerOptions, only_check: bool = False
) -> None:
    """Takes the proximal step of the L1 penalty; ``only_check`` raises its errors before anything has changed."""
    if options.l1_mode != "proximal":
        return
    for i, group in enumerate(param_groups):
        l1 = group.get("l1", options.l1)
        if l1 != 0:
            lr = checked_number(f"step: param_groups[{i}]: lr", group["lr"])
            amount = 0.0 if only_check else lr * l1
            soft_threshold_([p for p in group["params"] if p.grad is not None], amount)
