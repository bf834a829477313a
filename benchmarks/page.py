"""A result file as a page: `python -m benchmarks --page FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import result_tables
from benchmarks.report import QUIET_LOAD, SCHEMA
from benchmarks.result_tables import Result
from study.pages import (
    Bar,
    Block,
    Bullets,
    Charts,
    Document,
    Paragraph,
    Scale,
    Section,
    bar_chart,
    command_text,
    read_record,
    write_text,
)

_MEANING = (
    "Ours and torch's run side by side in one process, in turns; times are medians. The floor is "
    "what our path has to move per element with no help from caches. GB/s are floor bytes over "
    "time, the share is that of the bandwidth which a plain copy reached in the same rounds (on a "
    "CPU the faster of a copy and an in-place multiplication). A ratio says how many times as fast "
    "as the peer ours is: below 1 the peer is faster."
)
_PER_CALL = (
    "Cases without GB/s fit in cache and show the cost of a call, not of memory. All others start "
    "with cold buffers in every round."
)


def read_result(path: Path) -> Result:
    """Read what `bench --out` wrote.

    Args:
        path: of the JSON file.

    Raises:
        ValueError: the file cannot be read, or is no result of the benchmark.
    """
    kind = f"a result of the benchmark with schema 1 to {SCHEMA}"
    return read_record(path, kind, range(1, SCHEMA + 1), "cases")


def write_page(result: Result, path: Path) -> None:
    """Write `result` to `path` as one self-contained HTML file.

    Args:
        result: as `bench --out` writes it.
        path: where to; an existing file is replaced.
    """
    write_text(document(result).html(), path)


def document(result: Result) -> Document:
    """Lay a result out as a page."""
    environment = result["environment"]
    operations = result_tables.operations(result)
    targets = result["targets"]
    summary: list[Block] = [Paragraph(warning) for warning in _warnings(result)]
    if targets:
        summary.append(Paragraph(result_tables.targets_sentence(targets)))
    ranges = ((name, _range(cases)) for name, cases in operations.items())
    summary += [
        Bullets([(name, text) for name, text in ranges if text]),
        Paragraph(_MEANING, quiet=True),
    ]
    if any(not case["cold_buffers"] for case in result["cases"]):
        summary.append(Paragraph(_PER_CALL, quiet=True))
    sections = [Section("Ratios", [_ratio_charts(result, operations)])]
    if charts := _share_charts(operations):
        sections.append(Section("Share of copy bandwidth", [charts]))
    sections.append(
        Section("Times", [_times(name, cases, result) for name, cases in operations.items()])
    )
    if targets:
        sections.append(Section("Floors", [result_tables.targets_table(targets)]))
    if result["skipped"]:
        items = [(entry["case"], entry["reason"]) for entry in result["skipped"]]
        sections.append(Section("Not measured", [Bullets(items)]))
    return Document(
        title=f"steadygrad beside torch: {_machine(environment)}",
        lead=f"{len(result['cases'])} cases, measured {result['created'][:10]} with torch "
        f"{environment['torch']}, in {_threads(environment)}.",
        summary=summary,
        sections=sections,
        facts=_facts(result),
    )


def _warnings(result: Result) -> list[str]:
    found = []
    if result.get("rehearsal"):
        found.append("A rehearsal with emulated kernels: no time here means anything.")
    if (load := result["environment"]["load"]) > QUIET_LOAD:
        found.append(
            f"The machine was busy when this run began (load {load:.1f}): neither times nor "
            "ratios count, measure again on a quiet one."
        )
    return found


def _range(cases: Sequence[Result]) -> str:
    """The smallest and largest ratio of an operation against each of its peers."""
    ratios: dict[str, list[float]] = {}
    for case in cases:
        for peer in case["peers"]:
            ratios.setdefault(peer["name"], []).append(peer["ratio"])
    return "; ".join(
        f"{_span(min(found), max(found))} times as fast as {name}" for name, found in ratios.items()
    )


def _span(low: float, high: float) -> str:
    one, other = f"{low:.2f}", f"{high:.2f}"
    return one if one == other else f"{one} to {other}"


def _ratio_charts(result: Result, operations: dict[str, list[Result]]) -> Charts:
    ratios = [peer["ratio"] for case in result["cases"] for peer in case["peers"]]
    scale = Scale.around([1.0, *ratios], log=True, default=(0.5, 2.0))
    bars = {name: _ratio_bars(cases) for name, cases in operations.items()}
    everything = [bar for own in bars.values() for bar in own]
    charts = []
    for name, cases in operations.items():
        peers = _peers(cases)
        axis = f"times as fast as {peers[0]}" if len(peers) == 1 else "times as fast"
        chart = bar_chart(
            name,
            bars[name],
            scale,
            origin=1.0,
            axis=axis,
            marks=[(1.0, "solid")],
            beside=everything,
        )
        charts.append(chart)
    return Charts(
        "How many times as fast as each peer ours is, on one logarithmic scale. The line is at 1; "
        "hatched bars, at its left, are cases in which the peer is faster. Whiskers go from the "
        "lower to the upper quartile over the rounds.",
        charts,
        layout="ragged",
    )


def _peers(cases: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(peer["name"] for case in cases for peer in case["peers"]))


def _ratio_bars(cases: Sequence[Result]) -> list[Bar]:
    """A bar for each case and peer; below a heading for each case where there are several peers."""
    several = len(_peers(cases)) > 1
    bars = []
    for case in cases:
        if several:
            bars.append(Bar(case["shapes"]))
        for peer in case["peers"]:
            label, ratio = peer["name"] if several else case["shapes"], peer["ratio"]
            low, high = peer["round_ratio_quartiles"]
            style = "solid" if ratio >= 1.0 else "hatched"
            bars.append(Bar(label, ratio, f"{ratio:.2f}", low, high, style=style))
    return bars


def _share_charts(operations: dict[str, list[Result]]) -> Charts | None:
    bars = {name: _share_bars(cases) for name, cases in operations.items()}
    everything = [bar for own in bars.values() for bar in own]
    if not everything:
        return None
    scale = Scale(0.0, max(100.0, *(bar.value or 0.0 for bar in everything)))
    return Charts(
        "Floor bytes over time, in percent of the copy bandwidth that was measured in the same "
        "rounds. The dashed line is at 100 %; a second pass that finds data in cache can go beyond.",
        [
            bar_chart(
                name,
                own,
                scale,
                origin=0.0,
                axis="% of copy bandwidth",
                marks=[(100.0, "dashed")],
                beside=everything,
            )
            for name, own in bars.items()
            if own
        ],
        layout="ragged",
    )


def _share_bars(cases: Sequence[Result]) -> list[Bar]:
    shares = (
        (case["shapes"], 100 * case["share_of_copy"])
        for case in cases
        if case["cold_buffers"] and case["share_of_copy"] is not None
    )
    return [Bar(shapes, share, f"{share:.0f} %") for shapes, share in shares]


def _times(operation: str, cases: Sequence[Result], result: Result) -> Section:
    means = result_tables.means(result, operation)
    blocks: list[Block] = [
        Paragraph(result_tables.floor(cases)),
        result_tables.operation_table(cases, bool(means)),
    ]
    if means:
        blocks.append(Paragraph(result_tables.means_sentence(means)))
    missing = [(case["shapes"], why) for case in cases for why in case.get("unavailable", ())]
    if missing:
        blocks.append(Bullets([(f"peer missing in {name}", why) for name, why in missing]))
    return Section(operation, blocks)


def _machine(environment: Result) -> str:
    gpu = environment.get("gpu")
    return str(gpu["name"]) if gpu else f"{environment['cpu']}, {environment['cores']} cores"


def _threads(environment: Result) -> str:
    count = environment["threads"]
    return "one thread" if count == 1 else f"{count} threads"


def _facts(result: Result) -> list[tuple[str, str]]:
    environment, bandwidth = result["environment"], result["copy_bandwidth"]
    gpu = environment.get("gpu")
    cache = f"{environment['cache_bytes'] / 2**20:.0f} MiB"
    scaled = bandwidth["mul_gigabytes_per_second"]
    facts = [
        ("Date", result["created"]),
        ("Command", command_text(result.get("command_line", ()))),
        (
            "Machine",
            f"{environment['cpu']}, {environment['cores']} cores; {environment['machine']}",
        ),
        ("Memory", f"{environment['memory_bytes'] / 2**30:.0f} GiB"),
        ("L2 cache of the GPU" if gpu else "Last-level cache", cache),
        ("Threads", str(environment["threads"])),
        ("Load at the start", f"{environment['load']:.2f}"),
        (
            "Copy bandwidth",
            f"copy_ {bandwidth['copy_gigabytes_per_second']:,.0f} GB/s"
            + ("" if scaled is None else f", mul_ {scaled:,.0f} GB/s")
            + f", on buffers of {bandwidth['buffer_bytes'] / 2**20:,.0f} MiB",
        ),
        (
            "Versions",
            f"steadygrad {environment['steadygrad']}, torch {environment['torch']}, "
            f"Python {environment['python']}",
        ),
        ("Source", _source(environment)),
    ]
    if gpu:
        facts.insert(
            3,
            (
                "GPU",
                f"{gpu['name']}, {gpu['architecture']}, {gpu['multiprocessors']} multiprocessors, "
                f"driver {gpu['driver']}; CUDA: torch {gpu['torch_cuda']}, kernels "
                f"{gpu['kernels_runtime']}, nvcc {gpu['nvcc']}",
            ),
        )
    if result.get("quick"):
        facts.append(("Cases", "those of the quick table"))
    return facts


def _source(environment: Result) -> str:
    revision = environment.get("revision") or "unknown"
    tree, state = environment.get("csrc_tree", "unknown"), environment.get("csrc_state", "unknown")
    return f"revision {revision}, kernels {tree} ({state})"
