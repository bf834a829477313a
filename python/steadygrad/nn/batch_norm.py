"""Batch norm modules: torch's own, with an activation, a residual and synchronised statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx.proxy import Proxy, TraceError
from torch.nn.modules import batchnorm

from steadygrad.nn.functional import Activation, batch_norm
from steadygrad.nn.shared_group import SharedGroup
from steadygrad.reference.batch_norm import CEILINGS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _UnreadWithActivation:
    """An attribute that cannot be read while the module has an activation.

    Functions that make another module out of a batch norm (a synchronised, frozen or quantized one, or one folded into
    a convolution) read ``eps`` or ``num_features``. They do not know of an activation and would drop it silently.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            return self
        if module.activation is None:
            return vars(module)[self._name]
        kind = type(module).__name__
        # The error is no AttributeError, since getattr and hasattr would hide it.
        raise RuntimeError(
            f"{kind}.{self._name}: expected a module without an activation, got activation={module.activation!r}, "
            "which would be lost in a module that is made from this one: to synchronise, call "
            "steadygrad.nn.convert_batchnorm(model, process_group=torch.distributed.group.WORLD); to fold, freeze or "
            "quantize, set activation to None and put a torch.nn.ReLU or ReLU6 behind the module; to read the value "
            f"alone, vars(module)[{self._name!r}]"
        )

    def __set__(self, module: Any, value: Any) -> None:
        vars(module)[self._name] = value


class _BatchNorm(batchnorm._BatchNorm):
    """Base of the three batch norms; :class:`BatchNorm2d` describes it."""

    # The class has the attribute, too, for modules that were pickled or made without it.
    activation: Activation | None = None
    eps: Any = _UnreadWithActivation()
    num_features: Any = _UnreadWithActivation()
    # torch.jit.trace reads every attribute in __constants__, and every other one that __jit_ignored_attributes__ lacks.
    __constants__: Any = ("track_running_stats", "momentum", "affine")
    __jit_ignored_attributes__ = ("eps", "num_features", "process_group")

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation | None = None,
        process_group: ProcessGroup | None = None,
        **bias: bool,
    ) -> None:
        if activation not in CEILINGS:
            raise ValueError(
                f"{type(self).__name__}: activation: expected 'relu', 'relu6' or None, got {activation!r}"
            )
        # Older versions of torch have no `bias` and raise their own TypeError for it.
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **bias
        )
        self.activation = activation
        self.process_group = process_group

    def __dir__(self) -> list[str]:
        """Lists only attributes that can be read, since torch.jit.trace reads every one that is listed."""
        listed: Any = super().__dir__
        names: list[str] = listed()
        if self.activation is None:
            return names
        return [name for name in names if name not in ("eps", "num_features")]

    @property
    def process_group(self) -> ProcessGroup | None:
        """Returns the ranks that compute statistics together in training; None for this process alone."""
        shared = vars(self).get("process_group")
        return None if shared is None else shared.group()

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        vars(self)["process_group"] = SharedGroup.of(group)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: Activation | None = None,
    ) -> Tensor:
        """Normalises ``input``, adds ``residual``, and applies ``activation``; None is the module's own."""
        if isinstance(input, Proxy):
            return self._record(input, residual)
        checked: Any = self._check_input_dim
        checked(input)
        training = self.training
        momentum = self.momentum
        try:
            # Reading these from the dicts saves the 0.4 us that each attribute of a module costs.
            weight, bias = self._parameters["weight"], self._parameters["bias"]
            running_mean, running_var = self._buffers["running_mean"], self._buffers["running_var"]
            batches = self._buffers["num_batches_tracked"]
        except KeyError:  # replicas and parametrizations keep them elsewhere
            weight, bias = self.weight, self.bias
            running_mean, running_var = self.running_mean, self.running_var
            batches = self.num_batches_tracked
        if not training:
            batches = None
            training = running_mean is None and running_var is None
        elif not self.track_running_stats:
            running_mean = running_var = batches = None
        if momentum is None and batches is None:
            momentum = 0.0
        return batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            vars(self)["eps"],
            residual=residual,
            activation=self.activation if activation is None else activation,
            num_batches_tracked=batches,
            # In evaluation there is no collective, even with the batch's statistics, since one rank may evaluate alone.
            process_group=self.process_group if self.training else None,
        )

    def _record(self, input: Proxy, residual: Tensor | None) -> Any:
        """Records one call under ``torch.fx.symbolic_trace``, which does so itself only for modules of ``torch.nn``."""
        forward = self._forward_pre_hooks or self._forward_hooks
        if forward or self._backward_pre_hooks or self._backward_hooks:
            raise TraceError(
                f"{type(self).__name__}: expected no hooks, since they have already run on the traced values and would "
                "run again with the recorded call: use a torch.fx.Tracer whose is_leaf_module returns True for it"
            )
        tracer: Any = input.tracer
        given = (input,) if residual is None else (input, residual)
        return tracer.create_proxy("call_module", tracer.path_of_module(self), given, {})

    def extra_repr(self) -> str:
        """Returns the arguments as text, as torch's modules do."""
        shown: str = batchnorm._NormBase.extra_repr(self)
        if self.activation is not None:
            shown += f", activation={self.activation}"
        if self.process_group is not None:
            shown += ", process_group=..."
        return shown


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` on fused kernels, for input (N, C) or (N, C, L); see :class:`BatchNorm2d`."""


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` on fused kernels, for input of shape (N, C, H, W).

    Arguments, parameters, buffers and ``state_dict`` are torch's. The outputs differ from torch's only by rounding, and
    are the more exact ones. There is one difference: a channel of a batch whose statistics are not finite does not
    enter the running statistics.

    ``forward(input, residual=None, activation=None)`` adds ``residual``, of the input's shape and dtype, before the
    activation, which is the module's own if it is None.

    Args:
        num_features: Number of channels C.
        eps: Number added to the variance. Default: 1e-5.
        momentum: Weight of a batch in the running statistics; None for the average of all batches, which does not
            wait for the device. Default: 0.1.
        affine: Whether there are weight and bias. Default: True.
        track_running_stats: Whether there are running statistics. Default: True.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and buffers.
        activation: ``"relu"`` or ``"relu6"``, applied in the same pass, or None. Functions that make another module
            from this one's attributes (``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, ``fuse_conv_bn_eval``) would
            drop the activation. So ``eps`` and ``num_features`` raise a ``RuntimeError`` when they are read from a
            module that has one. Default: None.
        process_group: In training, statistics are computed over all ranks of this group;
            ``torch.distributed.group.WORLD`` stands for all ranks, None for this process alone. A module with the
            default group can be pickled. Loaded without ``torch.distributed`` it works alone, as torch's
            ``SyncBatchNorm`` does. Default: None.
        **bias: ``bias=False`` for a weight without a bias, if this version of torch has the argument.

    Raises:
        ValueError: The activation is unknown.

    :func:`steadygrad.nn.functional.batch_norm` lists what a call raises. A call that raises does not count as a batch.
    """


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` on fused kernels, for input of shape (N, C, D, H, W); see :class:`BatchNorm2d`."""
