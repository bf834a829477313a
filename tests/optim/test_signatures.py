"""The signatures of the optimizer classes: torch's parameters, then the Stabilizer's, and no others."""

from __future__ import annotations

import dataclasses
import inspect
import re
from inspect import Parameter as Argument
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import steadygrad as sg
from steadygrad.optim.options import StabilizerKeywords, StabilizerOptions
from tests.optim.optimizer_runs import plain_class

CLASSES = sorted(sg.optim.__all__)
all_classes = pytest.mark.parametrize("name", CLASSES)


def arguments(function: Any) -> dict[str, Argument]:
    return dict(inspect.signature(function).parameters)


def shown(argument: Argument) -> tuple[Any, ...]:
    """Return what a caller has to know of an argument."""
    return argument.name, argument.kind, argument.default


def own_arguments() -> dict[str, Argument]:
    listed = arguments(sg.Stabilizer)
    assert listed.pop("optimizer").kind is Argument.POSITIONAL_OR_KEYWORD
    return listed


def weight() -> Parameter:
    return Parameter(torch.zeros(2))


def test_the_first_screen_of_help_has_an_example_and_six_options() -> None:
    """A screen has 24 lines, of which help() needs 5 for the names and the signature."""
    screen = inspect.getdoc(sg.Stabilizer).split("\n")[:19]  # type: ignore[union-attr]
    listed = [found[1] for line in screen if (found := re.match(r"    (\w+): [A-Z`]", line))]
    options = ["max_norm", "clip", "skip", "nonfinite", "rounding", "telemetry"]
    assert sum(line.lstrip().startswith(">>> ") for line in screen) >= 3
    assert listed == ["optimizer", *options]


def test_help_describes_every_option_once() -> None:
    text = inspect.getdoc(sg.Stabilizer) or ""
    described = re.findall(r"(?m)^    (\w+): [A-Z`]", text.partition("Raises:")[0])
    assert sorted(described) == sorted(["optimizer", *own_arguments()])


def test_the_wrapper_has_the_options_in_their_order() -> None:
    own = own_arguments()
    for field, argument in zip(dataclasses.fields(StabilizerOptions), own.values(), strict=True):
        assert shown(argument) == (field.name, Argument.KEYWORD_ONLY, field.default)
        assert argument.annotation == field.type


def test_type_checkers_see_the_options_with_their_types() -> None:
    fields = {field.name: field.type for field in dataclasses.fields(StabilizerOptions)}
    typed = {
        key: value.__forward_arg__ for key, value in StabilizerKeywords.__annotations__.items()
    }
    assert list(typed.items()) == list(fields.items())


@all_classes
def test_a_class_has_torchs_parameters_and_then_the_wrappers(name: str) -> None:
    torchs, own = arguments(plain_class(name)), own_arguments()
    ours = arguments(getattr(sg.optim, name))
    by_position = [k for k, v in torchs.items() if v.kind is Argument.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(by_position)] == by_position
    assert set(ours) == set(torchs) | set(own) and list(ours)[-len(own) :] == list(own)
    assert not set(torchs) & set(own)
    for key, argument in ours.items():
        assert shown(argument) == shown(own[key] if key in own else torchs[key])
        assert argument.annotation is not Argument.empty
        if key in own:
            assert argument.annotation == own[key].annotation


@all_classes
def test_every_parameter_arrives(name: str) -> None:
    make = getattr(sg.optim, name)
    torchs = arguments(plain_class(name))
    # No two of these can be given together, and their defaults are not numbers that could be tested.
    apart = {"params", "foreach", "fused", "differentiable", "capturable", "nesterov"}
    apart |= {"betas", "etas", "step_sizes"}
    given = {key: 0.25 if v.default is not False else True for key, v in torchs.items()}
    given = {key: value for key, value in given.items() if key not in apart}
    optimizer = make([weight()], **given, max_norm=3.0, nonfinite="zero")
    group = optimizer.param_groups[0]
    for key, value in given.items():
        assert group.get(key, optimizer.defaults.get(key)) == value
    assert (group["max_norm"], optimizer._options.nonfinite) == (3.0, "zero")
    assert make([weight()], 0.125).param_groups[0]["lr"] == 0.125


@all_classes
def test_an_unknown_keyword_is_refused_by_name(name: str) -> None:
    make = getattr(sg.optim, name)
    decay = "weight_decay" if "weight_decay" in arguments(plain_class(name)) else ""
    for wrong, near in (("maxnorm", "max_norm"), ("weight_deacy", decay), ("L1", "")):
        advice = f"; did you mean '{near}'?" if near else ""
        with pytest.raises(TypeError) as refused:
            make([weight()], **{wrong: 1.0})
        assert str(refused.value) == f"{name}: unexpected keyword argument '{wrong}'{advice}"
    with pytest.raises(TypeError, match=rf"{name}.*'params'"):
        make()


def test_a_subclass_may_have_a_constructor_of_its_own() -> None:
    class Mine(sg.optim.SGD):
        def __init__(self, params: Any, limit: float, **others: Any) -> None:
            super().__init__(params, max_norm=limit, **others)

    assert Mine([weight()], 0.5, momentum=0.9).max_norm == 0.5
    with pytest.raises(TypeError, match=r"Mine: unexpected keyword argument 'momentun'; did you"):
        Mine([weight()], 0.5, momentun=0.9)


def test_a_keyword_that_only_another_torch_has_is_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torchs = torch.optim.SGD.__init__

    def newer(self: Any, params: Any, lr: Any = 1e-3, *, warp: int = 0, **others: Any) -> None:
        torchs(self, params, lr, **others)
        self.warp = warp

    monkeypatch.setattr(torch.optim.SGD, "__init__", newer)
    optimizer: Any = sg.optim.SGD([weight()], 0.1, warp=3, max_norm=1.0)  # type: ignore[call-arg]
    assert (optimizer.warp, optimizer.max_norm) == (3, 1.0)
