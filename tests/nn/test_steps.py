"""Which names Steps takes, and what convert_batchnorm says of names that are no members of a block."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import steadygrad as sg
from steadygrad.nn import known_blocks


class Block(nn.Module):
    """Is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.downsample = None

    def forward(self, x: Any) -> Any:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_blocks, "_REGISTERED", {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"body": "conv1 bn1 relu + relu"}, r"body: .*got '\+'; an addition is add=True"),
        ({"body": "self.conv bn"}, r"body: .*got 'self.conv'; write 'conv'"),
        ({"body": "conv, bn"}, r"body: .*got 'conv,'"),
        ({"body": "conv bn??"}, r"body: .*got 'bn\?\?'"),
        ({"body": "bn", "shortcut": "a.0"}, r"shortcut: .*got 'a.0'"),
        ({"body": "bn", "unless": "flag?"}, r"unless: .*got 'flag\?'"),
        ({"body": "bn", "add": "has skip"}, r"add: .*got 'has skip'"),
        ({"body": "bn", "last": "drop relu"}, r"last: expected one name.*got 'drop relu'"),
    ],
)
def test_names_that_no_member_can_have(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Steps: {message}"):
        sg.nn.Steps(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"body": ["conv", "bn"]}, {"body": "bn", "add": None}, {"body": "bn", "end": 3}],
)
def test_arguments_of_another_type(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"^Steps: \w+: expected"):
        sg.nn.Steps(**arguments)


MISSPELT = {
    "add": sg.nn.Steps("conv1 bn1 relu conv2 bn2 add relu"),
    "downsmaple": sg.nn.Steps("conv1 bn1 relu conv2 bn2", True, shortcut="downsmaple?"),
    "act": sg.nn.Steps("conv1 bn1 relu conv2 bn2", True, last="act"),
    "skip": sg.nn.Steps("conv1 bn1 relu conv2 bn2", "skip", last="relu"),
    "checkpoints": sg.nn.Steps("conv1 bn1 relu conv2 bn2", unless="checkpoints"),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_name_that_is_no_member_is_told_at_the_conversion(name: str) -> None:
    sg.nn.register_block(Block, MISSPELT[name])
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), Block())
    with pytest.raises(ValueError, match=rf"^convert_batchnorm: 2: .*a Block without '{name}':"):
        sg.nn.convert_batchnorm(model)
    assert {type(m) for m in model.modules() if "Norm" in type(m).__name__} == {nn.BatchNorm2d}
    assert type(model) is nn.Sequential
    assert type(sg.nn.convert_batchnorm(model, fuse=False)[2]) is Block
