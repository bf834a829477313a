"""Tests the cases on parameters: shapes, equal work and plans, and how they are measured."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import candidates, cases, environment, measure, results, shapes
from benchmarks.__main__ import measure as measure_into
from benchmarks.candidates import Workload
from benchmarks.case import Case
from benchmarks.timer import Candidate, DeviceRace, Timing
from tests.benchmarks.test_timer import Queue, launching

TINY = shapes.ModelShapes("tiny", "tiny", ((5,), (3, 7), (2, 3, 4)))
GPU = {
    "name": "NVIDIA Test",
    "architecture": "sm_90",
    "multiprocessors": 132,
    "memory_bytes": 2**37,
    "l2_bytes": 2**12,
    "driver": "580.1",
    "torch_cuda": "13.0",
    "kernels_runtime": "13.0",
    "nvcc": "13.0.88",
}


@pytest.mark.parametrize(
    ("model", "tensors", "elements"),
    [
        (shapes.resnet50(), 161, 25_557_032),
        (shapes.gpt2_small(), 148, 124_439_808),
        (shapes.POLICY, 6, 5_702),
        (shapes.DIGITS, 6, 118_282),
        (shapes.lora(), 96, 589_824),
        (shapes.lora(448, 4096), 448, 14_680_064),
        (shapes.many_small(), 2000, 64_000),
        (shapes.one_tensor(26), 1, 2**26),
    ],
    ids=lambda value: getattr(value, "key", None),
)
def test_shapes_have_the_published_sizes(
    model: shapes.ModelShapes, tensors: int, elements: int
) -> None:
    assert model.tensors == tensors
    assert model.elements == elements


def test_workload_keeps_the_clip_active() -> None:
    load = Workload(shapes.many_small(100, 32))
    for _ in range(20):
        load.tighten()
        before = torch.nn.utils.get_total_norm(load.grads)
        assert before > load.limit
        torch.nn.utils.clip_grad_norm_(load.params, load.limit)
    idle = Workload(TINY, clip_active=False)
    limit = idle.limit
    idle.tighten()
    assert idle.limit == limit > torch.nn.utils.get_total_norm(idle.grads)


@pytest.mark.parametrize("key", cases.OPERATIONS)
def test_every_peer_does_the_same_work(key: str) -> None:
    """Check that parameters are equal after a step, and gradients after a clip or a penalty."""
    operation = cases.OPERATIONS[key]
    left: dict[str, list[torch.Tensor]] = {}
    for build in operation.builds:
        load = operation.workload(TINY, torch.float32)
        candidate = build(load)
        for _ in range(3):
            candidate.prepare()
            candidate.run()
        steps = key not in {"clip_active", "clip_inactive", "clip_value", "add_penalty"}
        kept = load.params if steps and operation.draws.get("params", True) else load.grads
        left[candidate.name] = [tensor.detach() for tensor in kept]
    names = list(left)
    assert names[0] == "steadygrad"
    assert len(names) == len(operation.builds), "two peers with one name"
    for name in names[1:]:
        torch.testing.assert_close(left["steadygrad"], left[name], rtol=1e-5, atol=1e-6)


def test_floors_of_cases_name_peers_that_they_have() -> None:
    for name, peer, _, over in (*results.TARGETS, *results.CUDA_TARGETS):
        if not over:
            operation = cases.OPERATIONS[name.partition("/")[0]]
            load = operation.workload(TINY, torch.float32)
            assert peer in {build(load).name for build in operation.builds[1:]} | {results.COPY}


def test_the_plans_have_the_shapes_and_dtypes_that_matter() -> None:
    on_cpu = {case.key for case in cases.CASES}
    for model in ("resnet50", "gpt2", "policy", "digits", "lora96", "lora448", "small"):
        assert {f"adamw/{model}", f"clip_active/{model}"} <= on_cpu
    first = [case.key for case in cases.CUDA_CASES[:9]]
    assert first == [
        f"adamw/{model}{dtype}"
        for dtype in ("", "_bf16", "_fp16")
        for model in ("gpt2", "resnet50", "one_2e28")
    ]
    assert cases.CUDA_CASES[3].bytes_per_element == cases.CUDA_CASES[0].bytes_per_element / 2 == 16
    clocks = {case.key: case.clock for case in cases.CUDA_CASES}
    assert clocks["adamw/resnet50"] == clocks["adamw/small"] == "wall"
    assert clocks["adamw/gpt2"] == clocks["adamw/one_2e28"] == "device"


@pytest.fixture
def yardstick(monkeypatch: pytest.MonkeyPatch) -> measure.CopyYardstick:
    monkeypatch.setattr(measure, "_SMALLEST_BUFFER", 2**10)
    return measure.CopyYardstick(cache_bytes=2**10)


def test_derived_numbers(yardstick: measure.CopyYardstick) -> None:
    case = cases.model_case(cases.OPERATIONS["adamw"], shapes.one_tensor(20))
    laps = {"ours": 1e-3, "a": 2e-3, "b": 3e-3, "c": 5e-3, "copy_": 4e-6, "mul_": 2e-6}
    timings = [Timing(name, (lap, lap)) for name, lap in laps.items()]
    result = measure.case_result(case, timings, yardstick)
    assert [peer["ratio"] for peer in result["peers"]] == [2.0, 3.0, 5.0]
    assert result["floor_bytes"] == 32 * 2**20
    assert result["gigabytes_per_second"] == pytest.approx(32 * 2**20 / 1e-3 / 1e9)
    assert result["nanoseconds_per_tensor"] == pytest.approx(1e6)
    bandwidth = result["copy_bandwidth"]["yardstick_gigabytes_per_second"]
    assert bandwidth == 2 * yardstick.buffer_bytes / 2e-6 / 1e9
    assert result["share_of_copy"] == result["gigabytes_per_second"] / bandwidth


class Host(measure.HostDevice):
    """Replaces the CPU's plan with a short one, and its races with short ones."""

    def __init__(self, plan: Sequence[Case], rounds: int = 3) -> None:
        super().__init__()
        self.plan = plan
        self.efforts = ((0.0, rounds, rounds),) * 2


@pytest.fixture
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_SMALLEST_BUFFER", 2**16)
    monkeypatch.setattr(environment, "cache_bytes", lambda: 2**10)


@pytest.mark.usefixtures("small_caches")
def test_a_run_writes_what_it_found(tmp_path: Path) -> None:
    chosen = [
        cases.model_case(cases.OPERATIONS[key], TINY, quick=True, host_cost=host)
        for key, host in (("clip_active", False), ("adamw", True))
    ]
    hungry = cases.model_case(cases.OPERATIONS["adam"], shapes.one_tensor(50), quick=True)
    slow = cases.model_case(cases.OPERATIONS["sgd"], TINY)
    out = tmp_path / "bench.json"
    measure_into(Host([*chosen, hungry, slow]), quick=True, out=out)
    found = results.read_result(out)
    assert found["schema"] == results.SCHEMA
    assert found["environment"]["threads"] == torch.get_num_threads()
    assert found["environment"]["device"] == "cpu"
    assert found["environment"]["gpu"] is None
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", found["environment"]["revision"])
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", found["environment"]["csrc_tree"])
    assert found["rehearsal"] is False and found["quick"] is True
    assert found["command_line"] == sys.orig_argv
    assert found["copy_bandwidth"]["yardstick_gigabytes_per_second"] > 0
    assert [case["key"] for case in found["cases"]] == [case.key for case in chosen]
    assert [entry["case"] for entry in found["skipped"]] == [hungry.key]
    assert "needs " in found["skipped"][0]["reason"]
    assert {entry["met"] for entry in found["targets"]} == {None}
    clip, step = found["cases"]
    assert clip["share_of_copy"] > 0
    assert step["share_of_copy"] is None
    assert clip["bytes_per_element"] == 12
    assert clip["clock"] == "wall" and "wall_median_seconds" not in clip["ours"]
    for side in (clip["ours"], *clip["peers"]):
        assert side["rounds"] == 3
        lower, upper = side["lower_quartile_seconds"], side["upper_quartile_seconds"]
        assert 0 < lower <= side["median_seconds"] <= upper
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def failing(error: BaseException) -> Case:
    def broken(load: Workload) -> Candidate:
        raise error

    operation = dataclasses.replace(cases.OPERATIONS["clip_value"], builds=(broken,))
    return cases.model_case(operation, TINY, host_cost=True)


@pytest.mark.usefixtures("small_caches")
def test_a_case_that_fails_costs_only_itself() -> None:
    good = cases.model_case(cases.OPERATIONS["clip_active"], TINY, host_cost=True)
    *_, found = measure.measure_all(Host([failing(RuntimeError("out of luck")), good]), quick=False)
    assert [case["key"] for case in found["cases"]] == ["clip_active/tiny"]
    assert found["skipped"] == [{"case": "clip_value/tiny", "reason": "failed: out of luck"}]


@pytest.mark.usefixtures("small_caches")
def test_an_interrupt_loses_the_case_under_way_alone(tmp_path: Path) -> None:
    good = cases.model_case(cases.OPERATIONS["clip_active"], TINY, host_cost=True)
    out = tmp_path / "bench.json"
    with pytest.raises(KeyboardInterrupt):
        measure_into(Host([good, failing(KeyboardInterrupt())]), quick=False, out=out)
    assert [case["key"] for case in results.read_result(out)["cases"]] == [good.key]


class FakeDevice(measure.CudaDevice):
    """Imitates a GPU with tensors on the host and a scripted clock and queue."""

    place = torch.device("cpu")
    efforts = (0.0, 2, 2), (0.0, 2, 2)

    def __init__(self) -> None:
        self.queue = Queue()
        self.environment = environment.this_machine(GPU)
        self.race = partial(DeviceRace, events=self.queue, clock=self.queue.clock)

    def free_bytes(self) -> int:
        return 2**40

    def yardstick(self) -> measure.CopyYardstick:
        stick = measure.GpuYardstick(torch.device("cpu"), elements=2**10)
        stick.candidates = (launching(self.queue, "copy_", 0.0, 1e-6),)
        return stick


def scripted_run(monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """Measure a case on each side of the size where the clock changes, and one too large for memory."""
    device = FakeDevice()

    def ticking(name: str, host: float, gpu: float) -> Any:
        return lambda load: launching(device.queue, name, host, gpu)

    def broken(load: object) -> Candidate:
        raise RuntimeError("`fused=True` is not supported here\nby this torch")

    # No candidate looks at the buffers, so they are not drawn.
    monkeypatch.setattr(cases.Operation, "workload", lambda *_: None)
    ours, fused = ticking("steadygrad", 1e-5, 2e-5), ticking(candidates.CLIP_FUSED, 2e-4, 3e-5)
    operation = cases.Operation("adamw", "clip + AdamW", 8, 4, (ours, fused, broken))
    small = shapes.ModelShapes("small", "small", ((8,),) * 4)
    device.plan = [
        cases.model_case(operation, model, host_cost=model is small)
        for model in (small, shapes.one_tensor(28), shapes.one_tensor(50))
    ]
    *_, found = measure.measure_all(device, quick=False, **options)
    return dict(json.loads(json.dumps(found)))


def test_a_result_file_has_both_clocks_and_what_the_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    written = scripted_run(monkeypatch)
    assert written["environment"]["device"] == "cuda"
    assert written["environment"]["gpu"]["name"] == "NVIDIA Test"
    assert written["environment"]["cache_bytes"] == GPU["l2_bytes"]
    small, large = written["cases"]
    assert (small["clock"], large["clock"]) == ("wall", "device")
    assert small["buffer_sets"] == large["buffer_sets"] == 1
    assert small["peers"][0]["ratio"] == small["peers"][0]["wall_ratio"]
    assert large["peers"][0]["ratio"] == large["peers"][0]["device_ratio"] == pytest.approx(1.5)
    for case, elements in ((small, 32), (large, 2**28)):
        assert case["floor_bytes"] == 32 * elements
        assert case["ours"]["device_median_seconds"] == pytest.approx(2e-5)
        assert case["gigabytes_per_second"] == pytest.approx(32 * elements / 2e-5 / 1e9)
        assert case["share_of_copy"] == pytest.approx(
            case["gigabytes_per_second"] / (2 * 4 * 2**10 / 1e-6 / 1e9)
        )
        assert case["unavailable"] == ["RuntimeError: `fused=True` is not supported here"]
    assert written["copy_bandwidth"]["mul_gigabytes_per_second"] is None
    assert [entry["case"] for entry in written["skipped"]] == ["adamw/one_2e50"]
    assert [entry["peer"] for entry in written["targets"]] == [
        peer for _, peer, _, _ in results.CUDA_TARGETS
    ]


def test_a_limit_leaves_later_cases_out(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 5.0, 11.0])
    written = scripted_run(monkeypatch, limit=10.0, clock=lambda: next(times))
    assert [case["key"] for case in written["cases"]] == ["adamw/small"]
    reasons = {entry["case"]: entry["reason"] for entry in written["skipped"]}
    assert reasons["adamw/one_2e28"] == "the limit of 10 s was reached"


def test_a_rehearsal_judges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "adamw/one_2e28"
    met = {entry["case"]: entry["met"] for entry in scripted_run(monkeypatch)["targets"]}
    assert met[key] is True
    monkeypatch.setattr(FakeDevice, "rehearsal", True)
    assert {entry["met"] for entry in scripted_run(monkeypatch)["targets"]} == {None}


def test_small_sets_of_buffers_rotate_past_the_cache() -> None:
    device, clip = FakeDevice(), cases.OPERATIONS["clip_active"]
    few = shapes.ModelShapes("few", "few", ((2**9,),))
    assert device.sets(cases.model_case(clip, few)) == 4 * GPU["l2_bytes"] // (4 * 2**9)
    assert device.sets(cases.model_case(clip, few, host_cost=True)) == 1
    assert device.sets(cases.model_case(clip, shapes.one_tensor(28))) == 1


@pytest.mark.parametrize("key", ["batch_norm/32x512x7x7_fp32_nhwc", "adam/resnet50"])
def test_what_allocates_is_called_over_more_buffers_than_a_cache_holds(key: str) -> None:
    device = measure.HostDevice()
    (case,) = (case for case in device.plan if case.key == key)
    sets = device.sets(case)
    if case.allocates:
        assert sets * case.working_set_bytes >= 4 * device.environment["cache_bytes"]
    else:
        assert sets == 1
