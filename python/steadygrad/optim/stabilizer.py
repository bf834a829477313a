"""The wrapper that stabilizes the steps of any torch optimizer."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steadygrad.optim.classes import RULES, StabilizedClass
from steadygrad.optim.groups import check_loaded
from steadygrad.optim.hooks import own_step, watch
from steadygrad.optim.in_place import Closure, other_update_methods
from steadygrad.optim.options import (
    COUNTERS,
    LIMITS,
    ClipScope,
    L1Mode,
    Nonfinite,
    PenaltyOrder,
    Rounding,
    StabilizerOptions,
)
from steadygrad.optim.stabilized import StabilizedOptimizer
from steadygrad.optim.step import Stepper
from steadygrad.parameter_names import named_alike
from steadygrad.policies import ClipAdaptive, ClipPolicy, SkipSpikes
from steadygrad.policies.adaptive import CLIPPING
from steadygrad.telemetry.settings import Level, Telemetry


def _kind(optimizer: Stabilizer | StabilizedClass) -> str:
    """What a stabilized optimizer is, and what to do in the place of wrapping it."""
    if isinstance(optimizer, StabilizedClass):
        name = optimizer.rule.optimizer.__name__
        return (
            f"a steadygrad.optim.{name}, whose own step is stabilized: give it max_norm and the other options, "
            f"or wrap torch.optim.{name}"
        )
    name = type(optimizer.optimizer).__name__
    return f"a steadygrad.Stabilizer around {name}: give that one the options, or wrap the {name}"


class Stabilizer(StabilizedOptimizer, torch.optim.Optimizer):
    r"""A ``torch.optim.Optimizer`` around another one, whose steps survive exploding gradients.

    One step, in this order: unscale the gradient (``torch.amp.GradScaler``), add the penalty, take the norm
    :math:`N`, decide about non-finite elements, scale by :math:`\min(1, \text{max\_norm} / (N + 10^{-6}))`, clamp
    to ``clip_value``, then the wrapped optimizer's update rule. For ``torch.optim``'s SGD, Adam, AdamW, Adamax,
    NAdam, RAdam, Adagrad, Adadelta, RMSprop, ASGD and Rprop, and for :class:`steadygrad.optim.Lion`, all of it happens
    in two passes over memory and gradients are only read; for any other optimizer the
    gradients are changed in place before its own ``step``. :attr:`path` says which.

    Args:
        optimizer: any torch optimizer. Schedulers, ``GradScaler`` and checkpoints take this object in its place.
        max_norm: limit of the gradient norm, at least 0; None: no clipping, the norm is still taken. Default: None.
        clip: in the place of ``max_norm`` a policy that finds the limit: :class:`steadygrad.ClipPercentile`,
            ``ClipZScore``, ``ClipRelative``, ``ClipAdaptive``, ``Damp``, a :class:`steadygrad.ClipPolicy` of your own,
            or ``ClipNorm``, which is the same as ``max_norm``. The key ``max_norm`` of a param group is then a cap: the
            smaller of both coefficients holds. Default: None.
        skip: :class:`steadygrad.SkipSpikes` skips steps whose norm is too large. Default: None.
        norm_type: p of the norm, more than 0; ``inf`` allowed. Default: 2.
        clip_value: limit of every element after the norm's clip, at least 0. Default: None.
        l1: weight of the penalty :math:`l_1 \sum |p|`. Default: 0.
        l2: weight of the penalty :math:`\tfrac{l_2}{2} \sum p^2`. Default: 0.
        penalty_order: ``"before_clip"`` makes the penalties part of the clipped gradient, as if they were in the loss;
            ``"after_clip"`` keeps them whole, as weight decay is. Default: ``"before_clip"``.
        l1_mode: ``"subgradient"`` adds :math:`l_1 \operatorname{sign}(p)`; ``"proximal"`` shrinks parameters by
            :math:`\text{lr} \cdot l_1` after the update, which gives exact zeros. Default: ``"subgradient"``.
        clip_scope: ``"global"`` limits the norm of all gradients, ``"group"`` that of each param group, ``"tensor"``
            that of each parameter. Default: ``"global"``, or what the clip policy suggests.
        nonfinite: on infinite or NaN elements, anywhere: ``"skip"`` leaves parameters, state and step counters as they
            are and counts the step in :attr:`skipped_steps`; ``"zero"`` takes the elements as 0; ``"raise"`` raises
            :class:`steadygrad.NonfiniteGradientError`; ``"propagate"`` does what torch does. Default: ``"skip"``.
        write_grads: also write the gradient that the update uses into ``.grad``, before the update and in the dtype of
            ``.grad``: in half precision the update sees it rounded. Default: False.
        state_dtype: dtype of the state (``exp_avg`` and the like) of bf16 and fp16 parameters: None keeps the
            parameter's, as torch has it; ``torch.float32``. Default: None.
        rounding: what becomes of the bits of an update that a bf16 or fp16 parameter cannot hold. ``"nearest"`` loses
            them, as torch does. ``"stochastic"`` rounds up with the probability of the remainder, unbiased.
            ``"kahan"`` keeps them in a state ``kahan_compensation`` of the parameter's dtype. ``"master"`` keeps a
            state ``master_param``, a float32 copy that is updated in the parameter's place. Default: ``"nearest"``.
        rounding_seed: of ``"stochastic"``, in [0, 2^64): the same seed gives the same bits, on every device, and after
            resuming from a state dict. Default: 0.
        reduce_norm: for parameters that are not DTensors and of which every rank of a process group holds others, such
            as pipeline stages: that group, or a device mesh of one dimension. A list has one entry per param group,
            None for what is replicated, which counts once: ``[None, expert_group]``. All ranks then clip by one
            norm and skip the same steps, and all have to step. Default: None. See :mod:`steadygrad.distributed`.
        telemetry: ``"global"`` records norm, limit and outcome of each step, ``"tensor"`` also every parameter's norm;
            :class:`steadygrad.Telemetry` has more choices; None records nothing. See :meth:`report`, :attr:`telemetry`
            and :meth:`plot`. 20 skipped steps in a row are warned about. Default: ``"tensor"``, for the last 1,000
            steps or as many as 4 MB hold.

    Parameters may be DTensors, sharded in any way and on several meshes: the norm is that of all ranks, in one
    collective per step, and non-finite elements on one rank are non-finite for all.

    ``max_norm``, ``clip_value``, ``l1`` and ``l2`` are keys of every param group: set them per group, or change them
    while training. ``opt.max_norm = 0.5`` sets all groups at once, and is what groups that are added later get.
    Schedulers advance on skipped steps too, since they count calls.

    Under any ``rounding`` fp32 parameters are updated as ever. Penalties see half-precision parameters as they are
    stored, since the loss did; weight decay and the proximal step act on the value that is updated. A parameter that
    somebody else has written, by loading a model after its optimizer for instance, counts as written: where
    ``master_param`` no longer rounds to it, or it is not the rounded sum of itself and its compensation, what was kept
    is dropped. (A compensation may stay with a number of like size, as it is at most half of its last bit. In fp16 it
    keeps little of parameters below 0.01, since fp16 ends at 6e-8: take ``"master"`` there.) Sources: Micikevicius et
    al. 2018 (master weights), Zamirai et al. 2020, "Revisiting BFloat16 training" (the other two), Kahan 1965.

    Raises:
        TypeError: ``optimizer`` is none.
        ValueError: an option is negative, NaN or unknown, ``max_norm`` and ``clip`` are both given, or ``optimizer``
            is stabilized already or has update methods beside ``step``, as SAM has. From :meth:`step`: ``rounding`` or
            ``state_dtype`` asked of an optimizer on the in-place path, ``rounding="master"`` of fp64.
    """

    #: The wrapped optimizer.
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        max_norm: float | None = None,
        clip: ClipPolicy | None = None,
        skip: SkipSpikes | None = None,
        norm_type: float = 2.0,
        clip_value: float | None = None,
        l1: float = 0.0,
        l2: float = 0.0,
        penalty_order: PenaltyOrder = "before_clip",
        l1_mode: L1Mode = "subgradient",
        clip_scope: ClipScope | None = None,
        nonfinite: Nonfinite = "skip",
        write_grads: bool = False,
        state_dtype: torch.dtype | None = None,
        rounding: Rounding = "nearest",
        rounding_seed: int = 0,
        reduce_norm: Any = None,
        telemetry: Telemetry | Level | None = "tensor",
    ) -> None:
        # Not torch's __init__: param groups, state and defaults are the wrapped optimizer's.
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                "Stabilizer: optimizer: expected a torch.optim.Optimizer, "
                f"got {type(optimizer).__name__}"
            )
        if isinstance(optimizer, (Stabilizer, StabilizedClass)):
            raise ValueError(
                f"Stabilizer: optimizer: expected one that is not stabilized yet, got {_kind(optimizer)}"
            )
        others = other_update_methods(optimizer)
        if others:
            name = type(optimizer).__name__
            raise ValueError(
                f"Stabilizer: optimizer: expected one that updates parameters in step() alone, got {name}, which has "
                f"{', '.join(others)} too: that would go unclipped. Where it is made around a base optimizer, give it "
                f"a stabilized one, as in {name}(params, sg.optim.SGD, lr=0.1, max_norm=1.0)"
            )
        self.__setstate__(
            {
                "optimizer": optimizer,
                "_options": StabilizerOptions(
                    max_norm=max_norm,
                    clip=clip,
                    skip=skip,
                    norm_type=norm_type,
                    clip_value=clip_value,
                    l1=l1,
                    l2=l2,
                    penalty_order=penalty_order,
                    l1_mode=l1_mode,
                    clip_scope=clip_scope,
                    nonfinite=nonfinite,
                    write_grads=write_grads,
                    state_dtype=state_dtype,
                    rounding=rounding,
                    rounding_seed=rounding_seed,
                    reduce_norm=reduce_norm,
                    telemetry=telemetry,
                ),
            }
        )
        self._check_kernels()
        self._join_zero_redundancy(own=())
        self._current_stepper()  # hears from the optimizer's last wrapper
        # A wrapper made anew, or around a loaded checkpoint, follows its own options; the counters go on.
        for group in self.param_groups:
            if COUNTERS[0] in group:
                group.update({key: getattr(self._options, key) for key in LIMITS})
                if isinstance(clip, ClipAdaptive) and group.get(CLIPPING) is not None:
                    group[CLIPPING] = clip.clipping  # but None stays: a final layer
        self._add_group_keys()

    def _make_stepper(self) -> Stepper:
        return Stepper(
            self.optimizer,
            self._options,
            RULES.get(type(self.optimizer)),
            own_step,
            runs_hooks=True,
        )

    def step(self, closure: Closure | None = None) -> Any:
        """One stabilized step.

        Args:
            closure: re-evaluates the model and returns the loss; called with gradients enabled, before the norm. The
                wrapped optimizer's own step is given one only if it cannot do without, as LBFGS.

        Returns:
            The closure's loss, or None.

        Raises:
            NonfiniteGradientError: under ``nonfinite="raise"``.
            TooManySkippedSteps: as ``Telemetry(stop_after_skips=...)`` says.
            TypeError: a gradient is sparse for a rule that does not take it, or not on a supported device or dtype.
            ValueError: a hyper-parameter is negative or NaN, or shapes differ.
            RuntimeError: a tensor's storage was freed; a process group was destroyed, or ranks that step together hold
                other DTensors or have other options.

        A refused or skipped step changes nothing. But where the wrapped optimizer's own step raises, on the in-place
        path, gradients stay as they were clipped for it: restoring them would take a copy of all in every step.

        Hooks of this object run around every step; those of the wrapped optimizer around its update, so its post-hooks
        do not run when the step is skipped.

        On a CUDA device the fused step does not wait to hear whether it was skipped: the wrapped optimizer's hooks run
        either way, and a ``grad_scale`` or ``lr`` in a tensor there that is negative or not finite skips the step where
        a number would have been refused.
        """
        stepper = self.__dict__.get("_stepper") or self._current_stepper()
        if not (self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks):
            return stepper.step(self, closure)
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        kwargs: dict[str, Any] = {}
        for pre_hook in list(self._optimizer_step_pre_hooks.values()):
            changed = pre_hook(self, args, kwargs)
            if changed is not None:
                args, kwargs = changed
                closure = args[1] if len(args) > 1 else kwargs.get("closure")
        loss = stepper.step(self, closure)
        for post_hook in list(self._optimizer_step_post_hooks.values()):
            post_hook(self, args, kwargs)
        return loss

    # -- everything else is the wrapped optimizer's ---------------------------------------------

    # Hidden from type checkers, which could not find a misspelt name: they take ``opt.optimizer.name``.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """What this object does not have is looked up on the wrapped optimizer."""
            if name == "optimizer" or (name.startswith("__") and name.endswith("__")):
                raise AttributeError(name)
            return getattr(self.optimizer, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's param groups."""
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The wrapped optimizer's state."""
        state: defaultdict[Tensor, Any] = self.optimizer.state
        return state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        defaults: dict[str, Any] = self.optimizer.defaults
        return defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The wrapped optimizer's ``zero_grad``; drops what :func:`steadygrad.accumulate` has gathered."""
        self._drop_accumulated()
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group; keys it does not set get this wrapper's defaults."""
        self._flush()
        self.optimizer.add_param_group(named_alike(self.param_groups, param_group))
        self._enter_last_group()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict, with this wrapper's keys in its param groups; torch can load it."""
        with self._saving():
            state_dict: dict[str, Any] = self.optimizer.state_dict()
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of a wrapper or of a plain torch optimizer; what the latter lacks stays as it is."""
        check_loaded(state_dict, self._options)
        self._flush()
        kept = self._kept_group_keys()
        self.optimizer.load_state_dict(state_dict)
        self._after_load(state_dict, kept)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy."""
        self._flush_to_save()
        return {"optimizer": self.optimizer, "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes whole states, and partial ones as torch passes them: ``state``, ``param_groups``, ``defaults``."""
        self._flush()
        own = {key: value for key, value in state.items() if key in ("optimizer", "_options")}
        self.__dict__.update(own, _stepper=None)
        if "optimizer" in own:
            watch(self, self.optimizer)
        empty: Callable[[], OrderedDict[int, Any]] = OrderedDict
        self.__dict__.setdefault("_optimizer_step_pre_hooks", empty())
        self.__dict__.setdefault("_optimizer_step_post_hooks", empty())
        for key in ("defaults", "state", "param_groups"):
            if key in state:
                setattr(self, key, state[key])

    def __repr__(self) -> str:
        """The options that differ from their defaults, and the wrapped optimizer."""
        own = vars(self._options)
        default = vars(StabilizerOptions())
        changed = [f"{key}={own[key]!r}, " for key in default if own[key] != default[key]]
        return f"Stabilizer({''.join(changed).rstrip()}\n{self.optimizer!r})"
