"""The two paths of a CUDA batch norm: two reads of the tensors, and one where channels fit on chip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steadygrad import _kernels
from tests.backends import Backend
from tests.nn.batch_norm_calls import LAYOUTS, Case

PATHS = ["one_read", "two_reads"]
# One launch; or the sums, what follows from them, and the elements.
LAUNCHES = {"one_read": 1, "two_reads": 3}

# A unit has 8 elements, a group of columns 16 to 256 channels, and a block 256 threads, which share a channel whose
# plane has 1 KB or more.
SHAPES = {
    "one group": (40, 16, 5, 5),
    "a part of a unit": (6, 13, 9, 9),
    "part of a group": (16, 88, 4, 8),
    "several blocks a group": (64, 24, 16, 16),
    "few channels": (8, 2, 90, 91),
    "one channel": (5, 1, 33, 31),
    "unaligned planes": (64, 12, 7, 7),
    "long planes": (3, 3, 33, 40),
    "tiny planes": (50, 9, 2),
    "many channels": (24, 520),
    "one row": (1, 8, 1, 3),
}
HALF = torch.bfloat16

each_path = pytest.mark.parametrize("path", PATHS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture
def device(backend: Backend) -> torch.device:
    """Return a device that has both paths."""
    if not backend.asynchronous:
        pytest.skip("the CPU's kernels have one way")
    return backend.device


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that sets the path of the calls that follow."""
    return lambda path: monkeypatch.setenv("STEADYGRAD_BATCH_NORM_PATH", path)


def launches(call: Callable[[], object]) -> int:
    before = _kernels.launch_count()
    call()
    return int(_kernels.launch_count() - before)


def same_bits(a: Any, b: Any) -> bool:
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )


def results(case: Case) -> list[Tensor]:
    """Return everything that a forward and a backward call write."""
    output, mask, statistics = case.forward()
    grads = case.backward(mask, statistics)
    written = [output, statistics, *grads.values()]
    return written if mask is None else [*written, mask]


@each_path
@each_layout
@each_shape
@pytest.mark.parametrize("fusion", ["bn", "relu", "relu6", "add+relu", "add+relu6"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_shapes(
    device: torch.device,
    take: Callable[[str], None],
    path: str,
    layout: str,
    shape: tuple[int, ...],
    fusion: str,
    dtype: torch.dtype,
) -> None:
    take(path)
    case = Case(shape, device, dtype, layout, fusion, mean=3.0)
    exact = case.batch_statistics()
    case.keep_off_the_kink(exact)
    output, mask, statistics = case.forward()
    case.assert_output(output, exact)
    case.assert_mask(mask, output, exact)
    case.assert_gradients(case.backward(mask, statistics), exact)


@each_path
@each_layout
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes(
    device: torch.device, take: Callable[[str], None], path: str, layout: str, dtype: torch.dtype
) -> None:
    take(path)
    case = Case((20, 16, 12, 12), device, dtype, layout, "add+relu", mean=3.0)
    exact = case.batch_statistics()
    case.keep_off_the_kink(exact)
    output, mask, statistics = case.forward()
    case.assert_output(output, exact)
    case.assert_gradients(case.backward(mask, statistics), exact)


@each_path
@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_path_is_taken(
    device: torch.device, take: Callable[[str], None], path: str, layout: str, dtype: torch.dtype
) -> None:
    take(path)
    case = Case((32, 32, 8, 8), device, dtype, layout, "add+relu")
    assert case["input"].data_ptr() % 16 == 0
    _, mask, statistics = case.forward()
    assert launches(case.forward) == LAUNCHES[path]
    assert launches(lambda: case.backward(mask, statistics)) == LAUNCHES[path]


@each_layout
def test_paths_agree(device: torch.device, take: Callable[[str], None], layout: str) -> None:
    """Compare both paths; their statistics differ by a rounding, and so does everything that follows from them."""
    case = Case((64, 24, 16, 16), device, torch.float32, layout, "bn", mean=100.0)
    by_path = []
    for path in PATHS:
        take(path)
        by_path.append(results(case))
    for one, two in zip(*by_path, strict=True):
        np.testing.assert_allclose(one.cpu(), two.cpu(), rtol=2e-5, atol=2e-5)


@each_path
@each_layout
@pytest.mark.parametrize("shape", [(64, 24, 16, 16), (8, 2, 90, 91)], ids=str)
def test_same_bits_every_time(
    device: torch.device,
    take: Callable[[str], None],
    path: str,
    layout: str,
    shape: tuple[int, ...],
) -> None:
    """Repeat calls: each launch of the emulator draws another order of threads and blocks."""
    take(path)
    case = Case(shape, device, torch.float32, layout, "add+relu")
    first = results(case)
    for _ in range(3):
        assert same_bits(results(case), first)


@each_path
@each_layout
def test_one_block_far_from_the_others(
    device: torch.device, take: Callable[[str], None], path: str, layout: str
) -> None:
    """Its mean is the shift around which the blocks' sums are put together."""
    take(path)
    case = Case((64, 24, 16, 16), device, torch.float32, layout, "bn")
    values = case.array("input")
    values[:2] += 1e5
    case.put("input", values)
    exact = case.batch_statistics()
    statistics = case.forward()[2].cpu().numpy()
    np.testing.assert_allclose(statistics[:24], exact.mean, rtol=1e-6)
    np.testing.assert_allclose(statistics[24:48], exact.var, rtol=1e-6)


@each_path
@each_layout
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_storage_offsets(
    device: torch.device, take: Callable[[str], None], path: str, layout: str, offset: int
) -> None:
    """Use tensors that do not begin at 16 bytes; they are read element by element, in two reads."""
    take(path)
    case = Case((16, 24, 9, 8), device, HALF, layout, "add+relu", offset=offset)
    exact = case.batch_statistics()
    case.keep_off_the_kink(exact)
    output, mask, statistics = case.forward()
    case.assert_output(output, exact)
    case.assert_gradients(case.backward(mask, statistics), exact)


@each_path
@each_layout
def test_scratch_may_hold_anything(
    device: torch.device, take: Callable[[str], None], path: str, layout: str
) -> None:
    """Fill the scratch memory, since a replayed graph finds what the last replay has left there."""
    take(path)
    case = Case((64, 24, 16, 16), device, torch.float32, layout, "relu")
    want = results(case)
    kept: dict[int, Tensor] = {}

    def allocate(nbytes: int) -> Tensor:
        return kept.setdefault(
            nbytes, torch.full((nbytes,), 0x5A, dtype=torch.uint8, device=device)
        )

    class Replayed(Case):
        @property
        def allocate(self) -> Any:
            return allocate

    again = Replayed((64, 24, 16, 16), device, torch.float32, layout, "relu")
    for _ in range(3):
        assert same_bits(results(again), want)
    assert kept


@each_path
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batches_are_counted_once(
    device: torch.device, take: Callable[[str], None], path: str, momentum: float | None
) -> None:
    """Check the number of batches, and the cumulative factor, which uses the number after it went up."""
    take(path)
    case = Case((64, 48, 16, 16), device, torch.float32, "last")
    mean = torch.zeros(48, device=device)
    var = torch.zeros(48, device=device)
    batches = torch.tensor(3, dtype=torch.int64, device=device)
    case.forward(mean, var, batches, momentum)
    assert int(batches) == 4
    factor = 0.25 if momentum is None else momentum
    exact = case.batch_statistics()
    unbiased = exact.var * exact.count / (exact.count - 1)
    np.testing.assert_allclose(mean.cpu(), factor * exact.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var.cpu(), factor * unbiased, rtol=1e-5)


@pytest.fixture
def emulated(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of the emulator, which has 8 multiprocessors."""
    if device.type != "cpu":
        pytest.skip("only the emulator can be given another number of multiprocessors")
    return monkeypatch


@pytest.mark.parametrize("shape", [(3_000, 1, 9, 7), (150_000, 8)], ids=str)
def test_more_partials_than_threads_that_add_them(
    emulated: pytest.MonkeyPatch, take: Callable[[str], None], shape: tuple[int, ...]
) -> None:
    """A large GPU shares one channel among so many blocks that a thread loads several of their partials."""
    emulated.setenv("STEADYGRAD_EMULATION_MULTIPROCESSORS", "132")
    take("two_reads")
    case = Case(shape, torch.device("cpu"), torch.float32, "first", "relu", mean=3.0)
    exact = case.batch_statistics()
    case.keep_off_the_kink(exact)
    output, mask, statistics = case.forward()
    case.assert_output(output, exact)
    case.assert_gradients(case.backward(mask, statistics), exact)


@each_layout
def test_a_part_of_the_device(
    emulated: pytest.MonkeyPatch, take: Callable[[str], None], layout: str
) -> None:
    """Under MPS and in green contexts a launch is refused that would fit the device: two reads need no such one."""
    case = Case((64, 24, 16, 16), torch.device("cpu"), torch.float32, layout, "add+relu")
    take("two_reads")
    want = results(case)
    take("one_read")
    assert launches(case.forward) == LAUNCHES["one_read"]
    emulated.setenv("STEADYGRAD_EMULATION_COOPERATIVE", "4")
    _, mask, statistics = case.forward()
    assert launches(case.forward) == LAUNCHES["two_reads"]
    assert launches(lambda: case.backward(mask, statistics)) == LAUNCHES["two_reads"]
    assert same_bits(results(case), want)


@each_layout
def test_launch_margin(
    emulated: pytest.MonkeyPatch, take: Callable[[str], None], layout: str
) -> None:
    """One read leaves multiprocessors to the kernels of NCCL, where it is told to or there are several processes."""
    case = Case((64, 24, 16, 16), torch.device("cpu"), torch.float32, layout, "add+relu", mean=3.0)
    take("one_read")
    emulated.setenv("STEADYGRAD_EMULATION_COOPERATIVE", "4")
    emulated.setenv("STEADYGRAD_BATCH_NORM_MARGIN", "4")
    assert launches(case.forward) == LAUNCHES["one_read"]
    exact = case.batch_statistics()
    case.keep_off_the_kink(exact)
    output, mask, statistics = case.forward()
    case.assert_output(output, exact)
    case.assert_gradients(case.backward(mask, statistics), exact)
    emulated.delenv("STEADYGRAD_BATCH_NORM_MARGIN")
    emulated.delenv("STEADYGRAD_EMULATION_COOPERATIVE")
    emulated.setenv("WORLD_SIZE", "1")
    assert launches(case.forward) == LAUNCHES["one_read"]
    emulated.setenv("WORLD_SIZE", "8")  # leaves 16 multiprocessors, more than there are
    assert launches(case.forward) == LAUNCHES["two_reads"]


@pytest.mark.parametrize("margin", ["few", "-1", "3.5"])
def test_margin_without_sense(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, margin: str
) -> None:
    monkeypatch.setenv("STEADYGRAD_BATCH_NORM_MARGIN", margin)
    with pytest.raises(ValueError, match=f"multiprocessors, 0 or more, got '{margin}'"):
        Case((32, 32, 8, 8), device).forward()


def test_path_without_sense(device: torch.device, take: Callable[[str], None]) -> None:
    take("three_reads")
    case = Case((4, 8, 2, 2), device)
    with pytest.raises(ValueError, match="expected one_read or two_reads, got 'three_reads'"):
        case.forward()
