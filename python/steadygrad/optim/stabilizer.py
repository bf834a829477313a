"""The wrapper that stabilizes the steps of any torch optimizer."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steadygrad.optim.classes import RULES, StabilizedClass
from steadygrad.optim.groups import check_loaded
from steadygrad.optim.hooks import own_step, run_pre_hook, watch
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
    """Returns what kind of stabilized optimizer it is, and what to do instead of wrapping it."""
    if isinstance(optimizer, StabilizedClass):
        name = optimizer.rule.optimizer.__name__
        return (
            f"a steadygrad.optim.{name}, whose own step is stabilized: give it max_norm and the other options, "
            f"or wrap torch.optim.{name}"
        )
    name = type(optimizer.optimizer).__name__
    return f"a steadygrad.Stabilizer around {name}: give that one the options, or wrap the {name}"


class Stabilizer(StabilizedOptimizer, torch.optim.Optimizer):
    r"""Wraps a torch optimizer so that its steps survive exploding gradients.

    Examples:
        >>> opt = sg.Stabilizer(torch.optim.AdamW(model.parameters(), lr=3e-4), max_norm=1.0)
        >>> loss.backward()
        >>> opt.step()       # checks the gradients, clips them by their norm, and updates
        >>> opt.grad_norm    # the norm before the clip

    Args:
        optimizer: Any torch optimizer. Pass the Stabilizer instead of it to schedulers, ``GradScaler`` and checkpoints.
        max_norm: Limit of the gradient norm, at least 0. Default: None, which computes the norm without clipping.
        clip: A policy that finds the limit, such as ``sg.ClipZScore()``; ``max_norm`` is then a cap. Default: None.
        skip: ``sg.SkipSpikes()`` skips steps whose norm is unusually large. Default: None.
        nonfinite: What a NaN or infinity does: ``"skip"`` the step, count as ``"zero"``, ``"raise"``, or
            ``"propagate"`` as in torch. Default: ``"skip"``.
        rounding: ``"stochastic"``, ``"kahan"`` or ``"master"`` keep the small steps of bf16 and fp16 parameters, which
            ``"nearest"`` loses as torch does. Default: ``"nearest"``.
        telemetry: ``"tensor"`` records every step and parameter, ``"global"`` every step, None nothing. Default:
            ``"tensor"``.

    Args: Further limits
        norm_type: The exponent p of the norm, more than 0; ``inf`` is allowed. Default: 2.
        clip_scope: ``"global"`` limits the norm of all gradients, ``"group"`` that of each param group, ``"tensor"``
            that of each parameter. Default: ``"global"``, or the choice of the clip policy.
        clip_value: Limit of every element, after the clip by the norm, at least 0. Default: None.

    Args: Penalties
        l1: Weight of the penalty :math:`l_1 \sum |p|`. Default: 0.
        l2: Weight of the penalty :math:`\tfrac{l_2}{2} \sum p^2`. Default: 0.
        penalty_order: ``"before_clip"`` makes the penalties part of the clipped gradient, as if they were in the loss;
            ``"after_clip"`` adds them unclipped, like weight decay. Default: ``"before_clip"``.
        l1_mode: ``"subgradient"`` adds :math:`l_1 \operatorname{sign}(p)`; ``"proximal"`` shrinks parameters by
            :math:`\text{lr} \cdot l_1` after the update, which makes small ones exactly zero. Default:
            ``"subgradient"``.

    Args: Half precision
        state_dtype: Dtype of the state (``exp_avg`` and the like) of bf16 and fp16 parameters: ``torch.float32``, or
            None for the parameter's dtype, as in torch. Default: None.
        rounding_seed: Seed of ``rounding="stochastic"``, in [0, 2^64). The same seed gives the same bits on every
            device, and after resuming from a state dict. Default: 0.

    Args: Several processes, and gradients
        reduce_norm: A process group, or a device mesh of one dimension, whose ranks hold different parameters that are
            not DTensors, such as pipeline stages. A list has an entry per param group, with None for replicated
            parameters, which count once: ``[None, expert_group]``. All ranks then clip by one norm and skip the same
            steps, so all of them have to step. Default: None. See :mod:`steadygrad.distributed`.
        write_grads: Whether to write the gradient that the update uses into ``.grad``, before the update and in the
            dtype of ``.grad``, so that in half precision the update sees it rounded. Default: False.

    **A step** does the following, in this order: it unscales the gradient (``torch.amp.GradScaler``), adds the penalty,
    computes the norm :math:`N`, decides about non-finite elements, scales by
    :math:`\min(1, \text{max\_norm} / (N + 10^{-6}))`, clamps to ``clip_value``, and applies the wrapped optimizer's
    update rule. For ``torch.optim``'s SGD, Adam, AdamW, Adamax, NAdam, RAdam, Adagrad, Adadelta, RMSprop, ASGD and
    Rprop, and for :class:`steadygrad.optim.Lion`, this takes two passes over memory, and gradients are only read. For
    any other optimizer the gradients are changed in place before its own ``step``. :attr:`path` says which it is.

    **Limits.** ``max_norm``, ``clip_value``, ``l1`` and ``l2`` are keys of every param group: set them per group, or
    change them during training. ``opt.max_norm = 0.5`` sets all groups at once, and applies to groups that are added
    later. The policies for ``clip`` are :class:`steadygrad.ClipPercentile`, ``ClipZScore``, ``ClipRelative``,
    ``ClipAdaptive``, ``Damp``, ``ClipNorm``, which is the same as ``max_norm``, and a :class:`steadygrad.ClipPolicy` of
    your own. With a policy, ``max_norm`` is a cap: the smaller of both coefficients applies.

    **Steps that are not taken.** A skipped step leaves parameters, state and step counters as they are, and counts in
    :attr:`skipped_steps`. Schedulers advance all the same, since they count calls. After 20 skipped steps in a row
    there is a warning. ``nonfinite="raise"`` raises :class:`steadygrad.NonfiniteGradientError`.

    **Half precision.** ``rounding`` decides what happens to the bits of an update that a bf16 or fp16 parameter cannot
    hold; fp32 parameters are updated as usual. ``"stochastic"`` rounds up with a probability equal to the remainder, so
    the mean is right. ``"kahan"`` keeps the bits in a state ``kahan_compensation`` of the parameter's dtype.
    ``"master"`` keeps a state ``master_param``, a float32 copy that is updated instead of the parameter. Penalties use
    the parameter as it is stored, as the loss does; weight decay and the proximal step act on the value that is
    updated. If something else has written a parameter, for example by loading a model after its optimizer, the new
    value counts and what was kept is dropped: the step notices that ``master_param`` does not round to the parameter,
    or that the parameter is not the rounded sum of itself and its compensation. (A compensation may stay with a new
    number of similar size, since it is at most half of its last bit.) In fp16 a compensation holds little for
    parameters below 0.01, since fp16 ends at 6e-8; use ``"master"`` there. Sources: Micikevicius et al. 2018 (master
    weights), Zamirai et al. 2020, "Revisiting BFloat16 training" (the other two), Kahan 1965.

    **Several processes.** Parameters may be DTensors, sharded in any way and on several meshes. The norm is that of all
    ranks, in one collective per step, and a non-finite element on one rank counts on all of them.

    **Telemetry** keeps the last 1,000 steps, or as many as fit into 4 MB; :class:`steadygrad.Telemetry` has more
    choices. Read it with :meth:`report`, :attr:`telemetry` and :meth:`plot`.

    Raises:
        TypeError: ``optimizer`` is not an optimizer.
        ValueError: An option is negative, NaN or unknown; ``max_norm`` is given beside a ``ClipNorm``; or ``optimizer``
            is stabilized already or has update methods besides ``step``, as SAM has. :meth:`step` raises it for
            ``rounding`` or ``state_dtype`` with an optimizer on the in-place path, and for ``rounding="master"`` with
            fp64 parameters.
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
        # torch's __init__ is not called, since param groups, state and defaults are the wrapped optimizer's.
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
                f"{', '.join(others)} too: that would go unclipped. If it is made around a base optimizer, give it "
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
        self._current_stepper()  # takes over from the optimizer's last wrapper
        # A second wrapper, or one around a loaded checkpoint, uses its own limits; the counters go on.
        for group in self.param_groups:
            if COUNTERS[0] in group:
                group.update({key: getattr(self._options, key) for key in LIMITS})
                if isinstance(clip, ClipAdaptive) and group.get(CLIPPING) is not None:
                    group[CLIPPING] = clip.clipping  # None stays, as for a final layer
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
        """Takes one stabilized step.

        Args:
            closure: A function that re-evaluates the model and returns the loss. It is called with gradients enabled,
                before the norm. The wrapped optimizer's own step gets a closure only if it needs one, as LBFGS does.

        Returns:
            The closure's loss, or None.

        Raises:
            NonfiniteGradientError: There are non-finite gradients under ``nonfinite="raise"``.
            TooManySkippedSteps: Too many steps in a row were skipped, by ``Telemetry(stop_after_skips=...)``.
            TypeError: A gradient is sparse and the rule does not take it, or it has an unsupported device or dtype.
            ValueError: A hyper-parameter is negative or NaN, or shapes differ.
            RuntimeError: A tensor's storage was freed, a process group was destroyed, or ranks that step together hold
                different DTensors or have different options.

        A refused or skipped step changes nothing. There is one exception: if the wrapped optimizer's own step raises,
        on the in-place path, gradients stay as they were clipped for it. Restoring them would need a copy of all
        gradients in every step.

        The hooks of this object run around every step. Those of the wrapped optimizer run around its update, so its
        post-hooks do not run if the step is skipped.

        On a CUDA device the fused step does not wait to learn whether it was skipped. So the wrapped optimizer's hooks
        run in any case, and a ``grad_scale`` or ``lr`` in a tensor there that is negative or not finite skips the step,
        where a number would have been refused.
        """
        stepper = self.__dict__.get("_stepper") or self._current_stepper()
        if not (self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks):
            return stepper.step(self, closure)
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        kwargs: dict[str, Any] = {}
        for pre_hook in list(self._optimizer_step_pre_hooks.values()):
            args, kwargs = run_pre_hook(pre_hook, self, args, kwargs)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        loss = stepper.step(self, closure)
        for post_hook in list(self._optimizer_step_post_hooks.values()):
            post_hook(self, args, kwargs)
        return loss

    # -- everything else is the wrapped optimizer's ---------------------------------------------

    # This is hidden from type checkers, which could not find a misspelt name; they accept ``opt.optimizer.name``.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Looks up on the wrapped optimizer what this object does not have."""
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
        """Calls the wrapped optimizer's ``zero_grad``, and drops what :func:`steadygrad.accumulate` has gathered."""
        self._drop_accumulated()
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group; keys that it does not set get this wrapper's defaults."""
        self._flush()
        self.optimizer.add_param_group(named_alike(self.param_groups, param_group))
        self._enter_last_group()

    def state_dict(self) -> dict[str, Any]:
        """Returns the wrapped optimizer's state dict with this wrapper's keys in its groups; torch can load it."""
        with self._saving():
            state_dict: dict[str, Any] = self.optimizer.state_dict()
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of a wrapper or of a torch optimizer; keys that the latter lacks keep their values."""
        check_loaded(state_dict, self._options)
        self._flush()
        kept = self._kept_group_keys()
        self.optimizer.load_state_dict(state_dict)
        self._after_load(state_dict, kept)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the optimizer and the options, for pickle and deepcopy."""
        self._flush_to_save()
        return {"optimizer": self.optimizer, "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Sets a whole state, or a part of it as torch does: ``state``, ``param_groups``, ``defaults``."""
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
        """Returns the options that differ from their defaults, and the wrapped optimizer."""
        own = vars(self._options)
        default = vars(StabilizerOptions())
        changed = [f"{key}={own[key]!r}, " for key in default if own[key] != default[key]]
        return f"Stabilizer({''.join(changed).rstrip()}\n{self.optimizer!r})"
