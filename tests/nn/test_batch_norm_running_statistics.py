"""A channel whose batch statistics are not finite does not enter the running statistics; torch never forgets it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import steadygrad as sg
from tests.backends import Backend
from tests.nn.batch_norm_modules import LAYOUTS, laid_out


def bad_image(device: torch.device | str, value: float, layout: str = "first") -> Tensor:
    """Return an image of five channels, the second of which has one non-finite element."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64, generator=generator)
    x[2, 1, 0, 1] = value
    return laid_out(x.to(device), layout)


def trained(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        x = torch.randn(4, 5, 3, 3, dtype=torch.float64, generator=generator)
        norm(x.to(norm.running_mean))
    return norm


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_a_channel_that_is_not_finite(
    backend: Backend, value: float, momentum: float | None, layout: str
) -> None:
    new = {"momentum": momentum, "device": backend.device, "dtype": torch.float64}
    ours, theirs = trained(sg.nn.BatchNorm2d(5, **new)), trained(nn.BatchNorm2d(5, **new))
    before = copy.deepcopy(ours)
    for norm in (ours, theirs):
        norm(bad_image(backend.device, value, layout))
    assert not (theirs.running_mean.isfinite() & theirs.running_var.isfinite())[1]
    others = [0, 2, 3, 4]
    for name in ("running_mean", "running_var"):
        mine, kept = getattr(ours, name), getattr(before, name)
        assert torch.equal(mine[1], kept[1])
        torch.testing.assert_close(mine[others], getattr(theirs, name)[others])
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 4
    good = bad_image(backend.device, 0.5)
    assert ours.eval()(good).isfinite().all()


@pytest.mark.parametrize("path", ["one_read", "two_reads"])
def test_on_both_paths_of_a_device(
    backend: Backend, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEADYGRAD_BATCH_NORM_PATH", path)
    norm = sg.nn.BatchNorm2d(5, device=backend.device, dtype=torch.float64)
    norm(bad_image(backend.device, float("nan")))
    assert (norm.running_mean[1], norm.running_var[1]) == (0, 1)
    assert (norm.running_mean[[0, 2, 3, 4]] != 0).all()


def test_what_the_running_statistics_cannot_hold(backend: Backend) -> None:
    """Use a variance of 1e6, which fp16 cannot hold, and one of 1e40, which fp32 and bf16 cannot hold."""
    for dtype, scale in ((torch.float16, 1e3), (torch.float32, 1e25), (torch.bfloat16, 1e25)):
        norm = sg.nn.BatchNorm1d(3, momentum=1.0, device=backend.device, dtype=dtype)
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(4))
        x[:, 1] *= scale
        norm(x.to(backend.device, dtype))
        assert (norm.running_mean[1], norm.running_var[1]) == (0, 1)
        assert norm.running_var.isfinite().all() and norm.running_var[0] != 1


def test_in_compiled_code() -> None:
    torch._dynamo.reset()
    norm = sg.nn.BatchNorm2d(5, dtype=torch.float64)
    twin = copy.deepcopy(norm)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = bad_image("cpu", float("inf"))
    norm(x), compiled(x)
    for one, other in zip(norm.buffers(), twin.buffers(), strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


def test_where_torch_computes() -> None:
    """Use subclasses of tensors, which are left to torch and whose running statistics are corrected afterwards."""

    class Numbers(Tensor):
        pass

    norm = sg.nn.BatchNorm2d(5, dtype=torch.float64)
    plain = copy.deepcopy(norm)
    x = bad_image("cpu", float("inf"))
    norm(x.as_subclass(Numbers)), plain(x)
    for one, other in zip(norm.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one.as_subclass(Tensor), other)


def test_backward_of_an_evaluation_whose_statistics_have_changed() -> None:
    """Expect an error where torch's gradient would be that of other statistics than the output's."""
    norm = sg.nn.BatchNorm2d(5, dtype=torch.float64).eval()
    x = bad_image("cpu", 0.5).requires_grad_()
    output = norm(x)
    norm.train()(x.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
