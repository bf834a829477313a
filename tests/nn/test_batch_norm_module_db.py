"""torch's own inputs for its tests of batch norms, through converted and through restored modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import steadygrad as sg

pytestmark = pytest.mark.slow  # torch's test module takes seconds to import

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@pytest.fixture(scope="module")
def infos() -> dict[type[nn.Module], Any]:
    pytest.importorskip("expecttest")  # torch's test module needs it
    with pytest.MonkeyPatch.context() as patch:
        # It would forbid the tests of this process to set flags.
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        module = pytest.importorskip("torch.testing._internal.common_modules")
    return {info.module_cls: info for info in module.module_db if info.module_cls in KINDS}


def inputs(info: Any, training: bool) -> Iterator[tuple[nn.Module, tuple[Any, ...]]]:
    for given in info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
    ):
        made = given.constructor_input
        module = info.module_cls(*made.args, **made.kwargs).double().train(training)
        yield module, given.forward_input.args


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_gradients_and_buffers(
    infos: dict[type[nn.Module], Any], kind: type[nn.Module], training: bool
) -> None:
    count = 0
    for module, (x,) in inputs(infos[kind], training):
        count += 1
        converted = sg.nn.convert_batchnorm(copy.deepcopy(module))
        restored = sg.nn.restore_batchnorm(sg.nn.convert_batchnorm(copy.deepcopy(module)))
        assert isinstance(converted, sg.nn.batch_norm._BatchNorm) and type(restored) is kind
        found = []
        for m in (module, converted, restored):
            leaf = x.detach().clone().requires_grad_()
            output = m(leaf)
            output.square().sum().backward()
            grads = [parameter.grad for parameter in m.parameters()]
            found.append([output.detach(), leaf.grad, *grads, *m.buffers()])
        for other in found[1:]:
            torch.testing.assert_close(other, found[0])
    assert count >= 3
