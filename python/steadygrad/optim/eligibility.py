"""Whether an optimizer's step can be taken by the fused kernels, and if not, why."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from steadygrad.distributed.dtensors import local_tensor
from steadygrad.memory import is_asynchronous
from steadygrad.optim.rule import UpdateRule

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def why_not_fused(
    optimizer: torch.optim.Optimizer, rule: UpdateRule | None, bypasses_step: bool
) -> str | None:
    """A short reason, or None when the fused path takes everything this optimizer holds.

    ``bypasses_step``: whether fusing would pass over the optimizer's own ``step`` method.

    Raises:
        RuntimeError: a parameter is an inference tensor, which nothing may update.
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
    names = {id(group): rule.state_names(group) for group in optimizer.param_groups}
    seen: set[int] = set()
    for param, group in params:
        if is_lazy(param):
            continue  # like any parameter without a gradient; once it has one it is looked at again
        local = local_tensor(param)
        why = _why_not_param(local, rule)
        if why is None and local.numel() > 0 and local.data_ptr() in seen:
            why = "a parameter appears twice, or two share memory"
        if why is None:
            why = _why_not_state(optimizer, param, rule, names[id(group)])
        if why is not None:
            return why
        seen.add(local.data_ptr())
    return None


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
