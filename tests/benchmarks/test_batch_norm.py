"""Tests the batch-norm cases of the benchmark: equal work, bytes and plans."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter

import pytest
import torch

from benchmarks import batch_norm, cases, environment, measure
from benchmarks.batch_norm import Layer, batch_norm_case
from benchmarks.case import Case

CPU = torch.device("cpu")
ADDS = {"bn": (False, False), "bn+relu": (False, True), "bn+add+relu": (True, True)}


def batch_norms(plan: tuple[Case, ...]) -> list[Case]:
    return [case for case in plan if case.group.startswith("batch_norm")]


def layer(fusion: str = "bn", dtype: torch.dtype = torch.float32, **options: bool) -> Layer:
    add, relu = ADDS[fusion]
    return Layer(
        (4, 6, 5, 5),
        dtype,
        options.get("channels_last", True),
        add,
        relu,
        options.get("training", True),
    )


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fusion", ADDS)
@pytest.mark.parametrize("cuda", [False, True], ids=["peers of a CPU", "peers of a GPU"])
def test_every_peer_does_the_same_work(
    fusion: str, dtype: torch.dtype, training: bool, cuda: bool
) -> None:
    """Check that outputs and gradients are equal, in the dtype and layout of the inputs."""
    chosen = layer(fusion, dtype, training=training)
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    for build in batch_norm_case(chosen, cuda=cuda).builds:
        candidate = build(CPU)
        candidate.run()
        found[candidate.name] = candidate.run()  # type: ignore[assignment]
    first, *others = found.values()
    assert next(iter(found)) == "steadygrad"
    inputs = 1 + chosen.add
    assert len(first) == (1 + inputs + 2 if training else 1)
    for tensor in first[: 1 + inputs * training]:
        assert tensor.dtype == dtype
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    for other in others:
        if dtype == torch.float32:
            torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-4)
            continue
        # torch rounds once more before the sum, so ReLU may decide otherwise where the sum is near 0.
        alike = (first[0] > 0) == (other[0] > 0) if chosen.relu else torch.ones_like(first[0]) > 0
        assert alike.sum() > 0.99 * alike.numel()
        for one, another in zip(first[: 1 + inputs], other[: 1 + inputs], strict=True):
            torch.testing.assert_close(one[alike], another[alike], rtol=0.05, atol=0.1)


def test_candidates_share_no_tensor_and_draw_the_same_numbers() -> None:
    chosen = layer("bn+add+relu")
    first, second = (batch_norm.STEADYGRAD.build(chosen, CPU).run() for _ in range(2))
    for one, another in zip(first, second, strict=True):  # type: ignore[call-overload]
        assert torch.equal(one, another)
        assert one.data_ptr() != another.data_ptr()


@pytest.mark.parametrize(
    ("fusion", "in_place"), [("bn", 0), ("bn+relu", 1), ("bn+add+relu", 1)], ids=str
)
def test_peers_in_place_are_there_where_something_can_be(fusion: str, in_place: int) -> None:
    assert sum(peer.in_place for peer in batch_norm.peers(layer(fusion), cuda=False)) == in_place
    on_gpu = batch_norm.peers(layer(fusion), cuda=True)
    assert sum(peer.in_place for peer in on_gpu) == 2 * in_place
    names = [peer.name for peer in on_gpu]
    assert names[:2] == [batch_norm.CUDNN, batch_norm.NATIVE]
    assert names[-2:] == ["steadygrad, two reads", "steadygrad, one read"]
    assert not [p for p in batch_norm.peers(layer(training=False), cuda=True) if "reads" in p.name]


def test_a_peer_without_cudnn_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    forward = torch.nn.BatchNorm2d.forward

    def watched(self: torch.nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.backends.cudnn.enabled)
        return forward(self, x)

    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", watched)
    before = torch.backends.cudnn.enabled
    for peer in batch_norm.peers(layer(), cuda=True)[:2]:
        peer.build(layer(), CPU).run()
    assert seen == [True, False]
    assert torch.backends.cudnn.enabled == before


@pytest.mark.parametrize(
    ("fusion", "training", "dtype", "bytes_per_element"),
    [
        ("bn", True, torch.float32, 20),
        ("bn+relu", True, torch.float32, 20),
        ("bn+add+relu", True, torch.float32, 28.25),
        ("bn+add+relu", True, torch.bfloat16, 14.25),
        ("bn", False, torch.float16, 4),
        ("bn+add+relu", False, torch.float32, 12),
    ],
    ids=str,
)
def test_the_floor_counts_each_tensor_once(
    fusion: str, training: bool, dtype: torch.dtype, bytes_per_element: float
) -> None:
    case = batch_norm_case(layer(fusion, dtype, training=training))
    assert case.bytes_per_element == bytes_per_element
    assert case.floor_bytes == 4 * 6 * 5 * 5 * bytes_per_element
    assert case.floor_bytes >= case.working_set_bytes - 4 * 6 * 5 * 5 * dtype.itemsize
    assert case.memory_needed(2) > case.memory_needed() > case.working_set_bytes


def test_the_plan_on_a_cpu_has_every_layer_in_every_fusion() -> None:
    plan = batch_norms(cases.CASES)
    counts = Counter(case.group for case in plan)
    trained = {"batch_norm", "batch_norm_relu", "batch_norm_add_relu"}
    assert {counts[group] for group in trained} == {11}
    subjects = {group: [case.subject for case in plan if case.group == group] for group in trained}
    assert len({tuple(found) for found in subjects.values()}) == 1
    for subject in (
        "32x64x56x56 fp32 NCHW", "32x64x56x56 fp32 NHWC", "32x64x56x56 bf16 NHWC",
        "32x512x7x7 fp32 NCHW", "32x512x7x7 fp32 NHWC", "64x3x112x112 fp32 NCHW",
        "64x3x112x112 fp32 NHWC", "8x256x14x14 bf16 NHWC", "4096x256 fp32", "100000x32 fp32",
    ):  # fmt: skip
        assert subject in subjects["batch_norm"]
    assert {f"{group}_eval" for group in trained} <= set(counts)
    assert {case.group for case in plan if case.quick} == trained


def test_each_path_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEADYGRAD_BATCH_NORM_PATH", "from outside")
    for name in ("two_reads", "one_read", None):
        with batch_norm.path(name):
            assert os.environ.get("STEADYGRAD_BATCH_NORM_PATH") == name
    assert os.environ["STEADYGRAD_BATCH_NORM_PATH"] == "from outside"


def test_the_plan_on_a_gpu_is_resnet50_by_the_gpus_clock() -> None:
    plan = batch_norms(cases.CUDA_CASES)
    assert {case.clock for case in plan} == {"device"}
    assert {case.key.partition("/")[2].partition("x")[0] for case in plan} == {"256"}
    fusions = {"batch_norm", "batch_norm_relu", "batch_norm_add_relu"}
    # A time limit may end the run, so each fusion, dtype and layout comes before the rest.
    first = plan[: cases._FIRST]
    found = {(case.group, case.dtype, case.subject.split()[-1]) for case in first}
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    assert found == set(itertools.product(fusions, dtypes, ("NHWC", "NCHW")))
    assert {case.group for case in plan} == fusions | {f"{name}_eval" for name in fusions}
    assert {case.group for case in plan if case.quick} == {"batch_norm", "batch_norm_add_relu"}


def test_a_plan_is_cut_to_one_case_of_a_kind() -> None:
    def kind(case: Case) -> tuple[str, ...]:
        return (case.group, *case.subject.split()[1:])

    plan = batch_norms(cases.CUDA_CASES)
    cut = {case.key: case for case in (case.cut() for case in plan)}
    assert {kind(case) for case in cut.values()} == {kind(case) for case in plan}
    assert len(cut) < len(plan)
    assert {case.subject.split()[0] for case in cut.values()} == {"4x19x5x5"}


class Yardstick(measure.CopyYardstick):
    """Counts how often the caches are flushed."""

    flushed = 0

    def flush(self) -> None:
        self.flushed += 1
        super().flush()


def test_no_candidate_finds_in_cache_what_another_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_SMALLEST_BUFFER", 2**10)
    monkeypatch.setattr(environment, "cache_bytes", lambda: 2**10)
    yardstick = Yardstick(cache_bytes=2**10)
    case = batch_norm_case(layer("bn+relu"))
    race, missing = measure.contest(case, yardstick, measure.HostDevice())
    assert [candidate.name for candidate in race.candidates] == [
        "steadygrad", "torch", "torch in-place", "copy_", "mul_",
    ]  # fmt: skip
    timings = race.run(0.0, 4, 4)
    assert yardstick.flushed == 3 * 4 and missing == []
    result = measure.case_result(case, timings, yardstick)
    assert len(result["peers"]) == 2 and result["share_of_copy"] is not None


def test_keys_are_unique() -> None:
    for plan in (cases.CASES, cases.CUDA_CASES):
        keys = [case.key for case in plan]
        assert len(set(keys)) == len(keys)


def test_one_dimensional_layers_have_no_layout() -> None:
    flat = dataclasses.replace(layer("bn+relu"), shape=(9, 4), channels_last=False)
    case = batch_norm_case(flat)
    assert case.key == "batch_norm_relu/9x4_fp32"
    first, second = (build(CPU).run()[0] for build in case.builds[:2])  # type: ignore[index]
    torch.testing.assert_close(first, second)
