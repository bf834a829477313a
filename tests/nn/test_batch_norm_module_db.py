"""The inputs of torch's own tests of batch norms, through converted and through restored modules."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import steadygrad as sg

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def inputs(info: Any, training: bool) -> Iterator[tuple[nn.Module, tuple[Any, ...]]]:
    for given in info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
    ):
        made = given.constructor_input
        module = info.module_cls(*made.args, **made.kwargs).double().train(training)
        yield module, given.forward_input.args


def compare(info: Any, training: bool) -> int:
    """Check outputs, gradients and buffers for every input; return how many there were."""
    count = 0
    for module, (x,) in inputs(info, training):
        count += 1
        converted = sg.nn.convert_batchnorm(copy.deepcopy(module))
        restored = sg.nn.restore_batchnorm(sg.nn.convert_batchnorm(copy.deepcopy(module)))
        assert isinstance(converted, sg.nn.batch_norm._BatchNorm)
        assert type(restored) is info.module_cls
        found = []
        for m in (module, converted, restored):
            leaf = x.detach().clone().requires_grad_()
            output = m(leaf)
            output.square().sum().backward()
            grads = [parameter.grad for parameter in m.parameters()]
            found.append([output.detach(), leaf.grad, *grads, *m.buffers()])
        for other in found[1:]:
            torch.testing.assert_close(other, found[0])
    return count


def main() -> None:
    from torch.testing._internal.common_modules import module_db

    infos = {info.module_cls: info for info in module_db if info.module_cls in KINDS}
    for kind in KINDS:
        for training in (True, False):
            count = compare(infos[kind], training)
            sys.stdout.write(f"{kind.__name__}, training={training}: {count} inputs\n")


@pytest.mark.slow  # torch's test module takes seconds to import, and sets flags of the process
def test_outputs_gradients_and_buffers() -> None:
    pytest.importorskip("expecttest")  # torch's test module needs it
    command = [sys.executable, "-m", "tests.nn.test_batch_norm_module_db"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = [int(line.split()[-2]) for line in done.stdout.splitlines()]
    assert len(counts) == 6 and min(counts) >= 3, done.stdout


if __name__ == "__main__":
    main()
