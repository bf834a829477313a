"""The batch-norm cases of the benchmark: equal work, bytes, plans, means and floors."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from benchmarks import batch_norm_candidates as candidates
from benchmarks import cases, measure, report, summary, targets
from benchmarks.batch_norm import BatchNormCase
from benchmarks.batch_norm_candidates import Layer
from benchmarks.timer import Candidate, Timing

CPU = torch.device("cpu")
ADDS = {"bn": (False, False), "bn+relu": (False, True), "bn+add+relu": (True, True)}


def batch_norms(plan: tuple[cases.Case, ...]) -> list[BatchNormCase]:
    return [case for case in plan if isinstance(case, BatchNormCase)]


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
    """Equal outputs and gradients, of the inputs' dtype and layout."""
    chosen = layer(fusion, dtype, training=training)
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    for build in BatchNormCase(chosen, cuda=cuda).builds:
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
        # torch rounds once more before the sum, so ReLU may cut another way where that is near 0.
        alike = (first[0] > 0) == (other[0] > 0) if chosen.relu else torch.ones_like(first[0]) > 0
        assert alike.sum() > 0.99 * alike.numel()
        for one, another in zip(first[: 1 + inputs], other[: 1 + inputs], strict=True):
            torch.testing.assert_close(one[alike], another[alike], rtol=0.05, atol=0.1)


def test_candidates_share_no_tensor_and_draw_the_same_numbers() -> None:
    first, second = (candidates.Tensors(layer("bn+add+relu"), CPU) for _ in range(2))
    for name in ("input", "residual", "grad_output", "weight", "bias"):
        one, another = getattr(first, name), getattr(second, name)
        assert torch.equal(one, another)
        assert one.data_ptr() != another.data_ptr()
    assert not torch.equal(first.input, first.residual)


@pytest.mark.parametrize(
    ("fusion", "in_place"), [("bn", 0), ("bn+relu", 1), ("bn+add+relu", 1)], ids=str
)
def test_peers_in_place_are_there_where_something_can_be(fusion: str, in_place: int) -> None:
    assert sum(peer.in_place for peer in candidates.peers(layer(fusion), cuda=False)) == in_place
    on_gpu = candidates.peers(layer(fusion), cuda=True)
    assert sum(peer.in_place for peer in on_gpu) == 2 * in_place
    assert {peer.cudnn for peer in on_gpu} == {True, False}


def test_a_peer_without_cudnn_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    forward = torch.nn.BatchNorm2d.forward

    def watched(self: torch.nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.backends.cudnn.enabled)
        return forward(self, x)

    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", watched)
    before = torch.backends.cudnn.enabled
    for peer in candidates.peers(layer(), cuda=True):
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
    case = BatchNormCase(layer(fusion, dtype, training=training))
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


def test_the_plan_on_a_gpu_is_resnet50_by_the_gpus_clock() -> None:
    plan = batch_norms(cases.CUDA_CASES)
    assert {case.clock for case in plan} == {"device"}
    assert {case.layer.shape[0] for case in plan} == {256}
    trained = [case for case in plan if case.layer.training]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for channels_last in (True, False):
            groups = {
                case.group
                for case in trained
                if case.dtype == dtype and case.layer.channels_last == channels_last
            }
            assert groups == {"batch_norm", "batch_norm_relu", "batch_norm_add_relu"}
    assert any(case.quick for case in plan)
    # What counts most comes first, in case that the time is up.
    first = plan[:26]
    assert {case.dtype for case in first} == {torch.float16, torch.bfloat16}
    assert all(case.layer.channels_last and case.layer.training for case in first)


def test_a_plan_is_cut_to_one_case_of_a_kind() -> None:
    plan = batch_norms(cases.CUDA_CASES)
    cut = {case.key: case for case in (case.cut() for case in plan)}
    kinds = {(case.group, case.dtype, case.layer.channels_last) for case in plan}
    assert {(case.group, case.dtype, case.layer.channels_last) for case in cut.values()} == kinds
    assert len(cut) == len(kinds) < len(plan)
    assert {case.layer.shape for case in cut.values()} == {(4, 19, 5, 5)}


class Yardstick(measure.CopyYardstick):
    """Counts how often the caches are flushed."""

    flushed = 0

    def flush(self) -> None:
        self.flushed += 1
        super().flush()


@pytest.fixture
def yardstick(monkeypatch: pytest.MonkeyPatch) -> Iterator[Yardstick]:
    monkeypatch.setattr(measure, "_SMALLEST_BUFFER", 2**10)
    yield Yardstick(cache_bytes=2**10)


def test_no_candidate_finds_in_cache_what_another_freed(yardstick: Yardstick) -> None:
    contest = measure.Contest(BatchNormCase(layer("bn+relu")), yardstick)
    assert [candidate.name for candidate in contest.race.candidates] == [
        "steadygrad", "torch", "torch in-place", "copy_", "mul_",
    ]  # fmt: skip
    contest.race.run(0.0, 4, 4)
    assert yardstick.flushed == 3 * 4
    result = contest.result()
    assert len(result.peers) == 2 and result.share_of_copy is not None


def result_of(case: cases.Case, *ratios: float) -> measure.CaseResult:
    peers = tuple(
        measure.PeerResult(Timing(name, (ratio,)), ratio, ratio, (ratio, ratio))
        for name, ratio in zip((candidates.TORCH, candidates.TORCH_IN_PLACE), ratios, strict=False)
    )
    return measure.CaseResult(
        case, Timing("steadygrad", (1.0,)), peers, measure.CopyBandwidth(100.0)
    )


def plan_of(group: str) -> list[cases.Case]:
    return [case for case in cases.CASES if case.group == group]


def test_means_and_the_slowest_case() -> None:
    first, second = plan_of("batch_norm_relu")[:2]
    results = [result_of(first, 2.0, 1.0), result_of(second, 8.0, 9.0)]
    found = {entry.peer: entry for entry in summary.summaries(results)}
    assert list(found) == [candidates.TORCH, candidates.TORCH_IN_PLACE, summary.FASTEST]
    assert found[candidates.TORCH].mean == pytest.approx(4.0)
    assert found[candidates.TORCH_IN_PLACE].mean == pytest.approx(3.0)
    assert found[summary.FASTEST].mean == pytest.approx(math.sqrt(8.0))
    assert found[summary.FASTEST].least == 1.0
    assert found[summary.FASTEST].least_case == first.key
    (only,) = summary.summaries([result_of(plan_of("batch_norm")[0], 3.0)])
    assert (only.peer, only.cases, only.mean) == (candidates.TORCH, 1, pytest.approx(3.0))
    assert summary.summaries([result_of(plan_of("adamw")[0], 3.0)]) == []


def test_floors_over_a_group_need_all_of_it() -> None:
    plan = plan_of("batch_norm_relu")

    def verdicts(*results: measure.CaseResult) -> dict[tuple[str, str], targets.Verdict]:
        judged = targets.judge(results)
        return {(entry.target.name, entry.target.peer): entry for entry in judged}

    mean = ("batch_norm_relu, geometric mean", candidates.TORCH_IN_PLACE)
    slowest = ("batch_norm_relu, slowest case", summary.FASTEST)
    all_of_it = [result_of(case, 2.0, 1.9) for case in plan]
    found = verdicts(*all_of_it)
    assert found[mean].ratio == pytest.approx(1.9)
    assert found[mean].met is True and found[slowest].met is True
    assert found["batch_norm, geometric mean", candidates.TORCH].met is None

    found = verdicts(*all_of_it[1:])
    assert (found[mean].cases, found[mean].of, found[mean].met) == (10, 11, None)
    found = verdicts(
        result_of(plan[0], 2.0, 0.99), *[result_of(case, 2.0, 2.5) for case in plan[1:]]
    )
    assert found[mean].met is True and found[slowest].met is False
    text = str(report.targets_table(targets.judge(all_of_it[1:])))
    assert "10 of 11 run" in text and "not run" in text


def test_the_table_has_bytes_and_means() -> None:
    plan = plan_of("batch_norm_relu")
    text = str(report.cases_table([result_of(case, 2.0, 1.5) for case in plan], "test"))
    rows = [line.split() for line in text.splitlines()]
    first = "32x64x56x56 fp32 NHWC torch 1000 2000 2.00 128 0.1 0 %"
    assert first.split() in rows
    assert "geometric mean of 11" in text
    assert ["torch", "in-place", "1.50"] in rows
    assert "moves 5 x input" in text


def test_the_record_has_dtype_bytes_and_means() -> None:
    plan = plan_of("batch_norm_add_relu")[2:3]
    results = tuple(result_of(case, 2.0, 1.5) for case in plan)
    run = report.Run(_environment(), False, measure.CopyBandwidth(1.0), 1, results)
    found = report.to_json(run)
    (case,) = found["cases"]
    assert case["key"] == "batch_norm_add_relu/32x64x56x56_bf16_nhwc"
    assert (case["dtype"], case["bytes_per_element"], case["averaged"]) == ("bfloat16", 14.25, True)
    assert case["floor_bytes"] == 32 * 64 * 56 * 56 * 14.25
    assert [entry["peer"] for entry in found["summaries"]] == [
        candidates.TORCH, candidates.TORCH_IN_PLACE, summary.FASTEST,
    ]  # fmt: skip
    (mean,) = [
        entry
        for entry in found["targets"]
        if entry["case"] == "batch_norm_add_relu, geometric mean" and entry["peer"] == "torch"
    ]
    assert (mean["measured"], mean["met"]) == (pytest.approx(2.0), None)
    assert (mean["cases"], mean["of"]) == (1, 11)


def _environment() -> report.Environment:
    from benchmarks import environment

    return environment.this_machine()


def test_group_floors_name_groups_and_peers_of_the_plan() -> None:
    for plan, floors in ((cases.CASES, targets.TARGETS), (cases.CUDA_CASES, targets.CUDA_TARGETS)):
        for target in (target for target in floors if target.over):
            members = [case for case in batch_norms(plan) if case.group == target.case]
            assert members
            for case in members:
                names = {peer.name for peer in candidates.peers(case.layer, case.cuda)}
                assert target.peer in names | {summary.FASTEST}


def test_keys_are_unique() -> None:
    for plan in (cases.CASES, cases.CUDA_CASES):
        keys = [case.key for case in plan]
        assert len(set(keys)) == len(keys)


def test_one_dimensional_layers_have_no_layout() -> None:
    flat = BatchNormCase(dataclasses.replace(layer("bn+relu"), shape=(9, 4), channels_last=False))
    assert flat.key == "batch_norm_relu/9x4_fp32"
    outputs = []
    for build in flat.builds:
        candidate: Candidate = build(CPU)
        outputs.append(candidate.run()[0])  # type: ignore[index]
    torch.testing.assert_close(outputs[0], outputs[1])
