"""The modules: torch's own, with an activation, a residual and synchronised statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx.proxy import Proxy, TraceError
from torch.nn.modules import batchnorm

from steadygrad.nn.functional import Activation, batch_norm
from steadygrad.nn.shared_group import SharedGroup

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _UnreadWithActivation:
    """An attribute that cannot be read while the module has an activation.

    Whatever makes another module out of a batch norm (one that is synchronised, frozen, quantized or folded into a
    convolution) reads ``eps`` or ``num_features``, knows of no activation, and would lose it without a word.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            return self
        if module.activation is None:
            return vars(module)[self._name]
        kind = type(module).__name__
        # No AttributeError, for which getattr and hasattr have an answer of their own.
        raise RuntimeError(
            f"{kind}.{self._name}: expected a module without an activation, got activation={module.activation!r}, "
            "which whatever makes another module of this one would lose: to synchronise, call "
            "steadygrad.nn.convert_batchnorm(model, process_group=torch.distributed.group.WORLD); to fold, freeze or "
            "quantize, set activation to None and put a torch.nn.ReLU behind the module; to read the value alone, "
            f"vars(module)[{self._name!r}]"
        )

    def __set__(self, module: Any, value: Any) -> None:
        vars(module)[self._name] = value


class _BatchNorm(batchnorm._BatchNorm):
    """What the three have in common; :class:`BatchNorm2d` describes it."""

    # On the class too, for modules that were pickled or made without it.
    activation: Activation | None = None
    eps: Any = _UnreadWithActivation()
    num_features: Any = _UnreadWithActivation()
    # torch.jit.trace reads what is listed in the first and every other attribute that is not in the second.
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
        if activation not in (None, "relu"):
            raise ValueError(
                f"{type(self).__name__}: activation: expected 'relu' or None, got {activation!r}"
            )
        # `bias`: where this torch has it; where not, its own TypeError.
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **bias
        )
        self.activation = activation
        self.process_group = process_group

    def __dir__(self) -> list[str]:
        """Lists what can be read, since torch.jit.trace reads all that is listed."""
        listed: Any = super().__dir__
        names: list[str] = listed()
        if self.activation is None:
            return names
        return [name for name in names if name not in ("eps", "num_features")]

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks whose statistics are taken together in training; None for this process alone."""
        shared = vars(self).get("process_group")
        return None if shared is None else shared.group()

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        vars(self)["process_group"] = SharedGroup.of(group)

    def forward(
        self, input: Tensor, residual: Tensor | None = None, relu: bool | None = None
    ) -> Tensor:
        """Normalises ``input``, adds ``residual`` and applies ReLU, or the module's own activation for None."""
        if isinstance(input, Proxy):
            return self._record(input, residual)
        checked: Any = self._check_input_dim
        checked(input)
        training = self.training
        momentum = self.momentum
        try:
            # As attributes, without the 0.4 us that each costs there.
            weight, bias = self._parameters["weight"], self._parameters["bias"]
            running_mean, running_var = self._buffers["running_mean"], self._buffers["running_var"]
            batches = self._buffers["num_batches_tracked"]
        except KeyError:  # replicas and parametrizations have them elsewhere
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
            activation=self.activation if relu is None else "relu" if relu else None,
            num_batches_tracked=batches,
            # Never in evaluation, whose ranks may come alone; not even with the batch's statistics.
            process_group=self.process_group if self.training else None,
        )

    def _record(self, input: Proxy, residual: Tensor | None) -> Any:
        """Stays one call under ``torch.fx.symbolic_trace``, which gives that to modules of ``torch.nn`` alone."""
        forward = self._forward_pre_hooks or self._forward_hooks
        if forward or self._backward_pre_hooks or self._backward_hooks:
            raise TraceError(
                f"{type(self).__name__}: expected no hooks, which have run on the traced values when forward is "
                "reached and would run again with the call: use a torch.fx.Tracer whose is_leaf_module says True of it"
            )
        tracer: Any = input.tracer
        given = (input,) if residual is None else (input, residual)
        return tracer.create_proxy("call_module", tracer.path_of_module(self), given, {})

    def extra_repr(self) -> str:
        """The arguments, as torch's modules show theirs."""
        shown: str = batchnorm._NormBase.extra_repr(self)
        if self.activation is not None:
            shown += f", activation={self.activation}"
        if self.process_group is not None:
            shown += ", process_group=..."
        return shown


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` for input of (N, C) or (N, C, L); see :class:`BatchNorm2d`."""


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` on fused kernels, for input of (N, C, H, W).

    Arguments, parameters, buffers and ``state_dict`` are torch's, and so are the outputs but for rounding, where
    these are the closer ones; but a channel of a batch whose statistics are not finite stays out of the running ones.
    ``forward(input, residual=None, relu=None)`` also takes what is to be added before the activation, of the input's
    shape and dtype, and whether ReLU follows; None leaves that to ``activation``.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; None for the average of all batches, which does not
            wait for the device.
        affine: whether there are weight and bias.
        track_running_stats: whether there are running statistics.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        activation: ``"relu"``, in the same pass; or None. A module that has one is refused, by a ``RuntimeError``, by
            whatever makes another module of it from its attributes and would lose it
            (``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, ``fuse_conv_bn_eval``): ``eps`` and ``num_features``
            cannot be read.
        process_group: takes statistics over all its ranks when training; ``torch.distributed.group.WORLD`` for
            all. None for this process alone. A module over the default group can be pickled; where it is loaded
            without ``torch.distributed`` it is alone, as torch's ``SyncBatchNorm`` is.
        **bias: ``bias=False`` for weight alone, where this torch's class has it.

    Raises:
        ValueError: an unknown activation.

    What a call raises: :func:`steadygrad.nn.functional.batch_norm`. A call that is refused does not count as a batch.
    """


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` for input of (N, C, D, H, W); see :class:`BatchNorm2d`."""
