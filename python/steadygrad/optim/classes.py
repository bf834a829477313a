"""``torch.optim``'s classes with a stabilized step, and the fused rules that they use."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from steadygrad.optim import lion
from steadygrad.optim.groups import check_loaded
from steadygrad.optim.hooks import is_watched, run_hooked
from steadygrad.optim.in_place import Closure
from steadygrad.optim.options import StabilizerKeywords, StabilizerOptions
from steadygrad.optim.stabilized import StabilizedOptimizer
from steadygrad.optim.state import Group, UpdateRule
from steadygrad.optim.step import AMP_KEYS, Stepper
from steadygrad.parameter_names import named_alike

if TYPE_CHECKING:
    from typing_extensions import Unpack

Constructor = TypeVar("Constructor", bound=Callable[..., None])


def written_out(signature: Constructor) -> Constructor:
    """Decorates a constructor that only declares a signature; :class:`StabilizedClass` takes the arguments.

    Editors, type checkers and ``inspect`` see the parameters, while arguments that are not given get the defaults of
    the installed torch. ``inspect`` sees each of the Stabilizer's options instead of ``options``.
    """

    @functools.wraps(signature)
    def __init__(self: StabilizedClass, *args: Any, **kwargs: Any) -> None:
        StabilizedClass.__init__(self, *args, **kwargs)

    shown = inspect.signature(signature)
    *torchs, _ = shown.parameters.values()
    own = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=field.type,
        )
        for field in dataclasses.fields(StabilizerOptions)
    ]
    shown = shown.replace(parameters=[*torchs, *own])
    __init__.__signature__ = shown  # type: ignore[attr-defined]
    return __init__  # type: ignore[return-value]


class StabilizedClass(StabilizedOptimizer):
    """Adds a stabilized step to a torch optimizer class, into which it is mixed.

    The class takes torch's arguments, and the keyword arguments of :class:`steadygrad.Stabilizer`.
    """

    rule: ClassVar[UpdateRule]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        own = {field.name for field in dataclasses.fields(StabilizerOptions)}
        self._check_keywords(kwargs, own)
        given = own & set(kwargs)
        self._options = StabilizerOptions(**{name: kwargs.pop(name) for name in given})
        self._stepper = None
        super().__init__(*args, **kwargs)
        self._check_kernels()
        self._join_zero_redundancy(given)

    def _check_keywords(self, given: Iterable[str], own: set[str]) -> None:
        """Refuses unknown names; the installed torch may have arguments that our signatures do not list."""
        known = own | set(inspect.signature(self.rule.optimizer).parameters)
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                advice = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(
                    f"{type(self).__name__}: unexpected keyword argument {name!r}{advice}"
                )

    def _make_stepper(self) -> Stepper:
        assert isinstance(self, torch.optim.Optimizer)
        torch_step = self.rule.optimizer.step
        # torch wraps the step of each class to run hooks. Here the hooks run around our own step.
        if getattr(torch_step, "hooked", False):
            torch_step = torch_step.__wrapped__  # type: ignore[attr-defined]
        return Stepper(
            self,
            self._options,
            self.rule,
            lambda optimizer, *closure: optimizer._torch_step(torch_step, *closure),
            runs_hooks=False,
        )

    def _torch_step(self, torch_step: Any, *closure: Closure) -> Any:
        # Without these attributes torch's own step does not unscale the gradients a second time.
        amp = {key: self.__dict__.pop(key) for key in AMP_KEYS if key in self.__dict__}
        try:
            return torch_step(self, *closure)
        finally:
            self.__dict__.update(amp)

    def step(self, closure: Closure | None = None) -> Any:
        """Takes one stabilized step; see :meth:`steadygrad.Stabilizer.step`."""
        assert isinstance(self, torch.optim.Optimizer)
        stepper = self.__dict__.get("_stepper") or self._current_stepper()
        if not is_watched(self):
            return stepper.step(self, closure)
        return run_hooked(self, lambda closure: (stepper.step(self, closure), True), closure)

    # This mark keeps torch from wrapping the step, which would run the hooks twice.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets gradients to None or zero as torch does, and drops what :func:`steadygrad.accumulate` has gathered."""
        self._drop_accumulated()
        super().zero_grad(set_to_none=set_to_none)  # type: ignore[misc]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group; keys that it does not set get this optimizer's defaults."""
        self._flush()
        super().add_param_group(named_alike(self.param_groups, param_group))  # type: ignore[misc]
        self._enter_last_group()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of torch's; keys that torch's lacks keep their values."""
        check_loaded(state_dict, self._options)
        self._flush()
        kept = self._kept_group_keys()
        super().load_state_dict(state_dict)  # type: ignore[misc]
        self._after_load(state_dict, kept)

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's state dict, with this class's keys in its param groups; torch can load it."""
        with self._saving():
            state_dict: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        return state_dict

    def __getstate__(self) -> dict[str, Any]:
        """Returns torch's state for pickle and deepcopy, and the options."""
        self._flush_to_save()
        state: dict[str, Any] = super().__getstate__()  # type: ignore[misc]
        return {**state, "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Sets a whole state or, as torch's ``load_state_dict`` does, a part of it."""
        self._flush()
        super().__setstate__(state)  # type: ignore[misc]
        self._stepper = None


class SGD(StabilizedClass, torch.optim.SGD):
    """``torch.optim.SGD`` with the keyword arguments of :class:`steadygrad.Stabilizer`."""

    rule = UpdateRule("sgd", torch.optim.SGD, takes_sparse=True)

    @written_out
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StabilizerKeywords],
    ) -> None: ...


class Adam(StabilizedClass, torch.optim.Adam):
    """``torch.optim.Adam`` with the keyword arguments of :class:`steadygrad.Stabilizer`."""

    rule = UpdateRule("adam", torch.optim.Adam)

    @written_out
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[StabilizerKeywords],
    ) -> None: ...


class AdamW(StabilizedClass, torch.optim.AdamW):
    """``torch.optim.AdamW`` with the keyword arguments of :class:`steadygrad.Stabilizer`."""

    rule = UpdateRule("adam", torch.optim.AdamW)

    @written_out
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StabilizerKeywords],
    ) -> None: ...


def _initial_sum(group: Group, name: str) -> float:
    return float(group["initial_accumulator_value"]) if name == "sum" else 0.0


class Adagrad(StabilizedClass, torch.optim.Adagrad):
    """``torch.optim.Adagrad`` with the keyword arguments of :class:`steadygrad.Stabilizer`."""

    rule = UpdateRule("adagrad", torch.optim.Adagrad, takes_sparse=True, initial_value=_initial_sum)

    @written_out
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StabilizerKeywords],
    ) -> None: ...


class RMSprop(StabilizedClass, torch.optim.RMSprop):
    """``torch.optim.RMSprop`` with the keyword arguments of :class:`steadygrad.Stabilizer`."""

    rule = UpdateRule("rmsprop", torch.optim.RMSprop)

    @written_out
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[StabilizerKeywords],
    ) -> None: ...


def _initial_mu_product(group: Group, name: str) -> float:
    return 1.0 if name == "mu_product" else 0.0


def _initial_eta_and_mu(group: Group, name: str) -> float:
    return {"eta": float(group["lr"]), "mu": 1.0}.get(name, 0.0)


def _initial_step_size(group: Group, name: str) -> float:
    return float(group["lr"]) if name == "step_size" else 0.0


class Adamax(StabilizedClass, torch.optim.Adamax):
    """``torch.optim.Adamax`` with the keyword arguments of :class:`steadygrad.Stabilizer`."""

    rule = UpdateRule("adamax", torch.optim.Adamax)

    @written_out
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.002,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[StabilizerKeywords],
    ) -> None: ...


class NAdam(StabilizedClass, torch.optim.NAdam):
    """``torch.optim.NAdam`` with the keyword arguments of :class:`steadygrad.Stabilizer`."""

    rule = UpdateRule("nadam", torch.optim.NAdam, initial_value=_initial_mu_product)

    @written_out
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.002,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        momentum_decay: float = 0.004,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[StabilizerKeywords],
    ) -> None: ...


class RAdam(StabilizedClass, torch.optim.RAdam):
    """``torch.optim.RAdam`` with the keyword arguments of :class:`steadygrad.Stabilizer`."""

    rule = UpdateRule("radam", torch.optim.RAdam)

    @written_out
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[StabilizerKeywords],
    ) -> None: ...


class Adadelta(StabilizedClass, torch.optim.Adadelta):
    """``torch.optim.Adadelta`` with the keyword arguments of :class:`steadygrad.Stabilizer`."""

    rule = UpdateRule("adadelta", torch.optim.Adadelta)

    @written_out
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-06,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[StabilizerKeywords],
    ) -> None: ...


class ASGD(StabilizedClass, torch.optim.ASGD):
    """``torch.optim.ASGD`` with the keyword arguments of :class:`steadygrad.Stabilizer`."""

    rule = UpdateRule("asgd", torch.optim.ASGD, initial_value=_initial_eta_and_mu)

    @written_out
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        lambd: float = 0.0001,
        alpha: float = 0.75,
        t0: float = 1000000.0,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[StabilizerKeywords],
    ) -> None: ...


class Rprop(StabilizedClass, torch.optim.Rprop):
    """``torch.optim.Rprop`` with the keyword arguments of :class:`steadygrad.Stabilizer`."""

    rule = UpdateRule("rprop", torch.optim.Rprop, initial_value=_initial_step_size)

    @written_out
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-06, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[StabilizerKeywords],
    ) -> None: ...


class Lion(StabilizedClass, lion.Lion):
    """Lion (Chen et al. 2023) with the keyword arguments of :class:`steadygrad.Stabilizer`.

    Lion's own arguments and its formula are those of :class:`steadygrad.optim.lion.Lion`.
    """

    rule = UpdateRule("lion", lion.Lion)

    @written_out
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0001,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[StabilizerKeywords],
    ) -> None: ...


# The fused rule of each class. Subclasses are not fused, since a subclass may override anything.
RULES = {
    kind.rule.optimizer: kind.rule
    for kind in (
        *(SGD, Adam, AdamW, Adagrad, RMSprop, Adamax),
        *(NAdam, RAdam, Adadelta, ASGD, Rprop, Lion),
    )
}
