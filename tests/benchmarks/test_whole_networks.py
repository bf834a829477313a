"""Tests that the benchmark of whole networks compares fused with unfused modules."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import whole_networks
from steadygrad.nn import known_blocks
from steadygrad.nn.conversion_report import conversion_report
from steadygrad.nn.convert import convert_batchnorm
from tests.nn.networks import resnet18


def test_the_networks_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, int] = {}

    def speed(*_: Any) -> str:
        found.update(conversion_report(convert_batchnorm(resnet18(10))).operations)
        return ""

    monkeypatch.setattr(known_blocks, "_REGISTERED", {})
    monkeypatch.setattr(whole_networks, "memory", lambda *_: "")
    monkeypatch.setattr(whole_networks, "speed", speed)
    monkeypatch.setattr(whole_networks, "THREADS", 1)
    whole_networks.main([])
    assert found == {"batch norm + ReLU": 9, "batch norm + add + ReLU": 8}
