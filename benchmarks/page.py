"""Write a result as one self-contained HTML file: a chart of ratios, and the terminal's tables."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.results import Result, machine_of, operations
from benchmarks.tables import TEMPLATES, render, show, subject


def write_page(result: Result, path: Path, targets: bool = False) -> None:
    """Write a result to `path`, whose folder is created; an existing file is replaced."""
    text = Console(file=io.StringIO(), width=100, record=True)
    show(text, render(result, targets))
    page = TEMPLATES.get_template("page.html.jinja").render(
        title=f"steadygrad beside torch: {machine_of(result)}, {result['created'][:10]}",
        chart=ratio_chart(result),
        tables=text.export_text(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def ratio_chart(result: Result) -> str:
    """Draw a bar for each case and peer as SVG, with a panel per operation and one scale for all."""
    panels = [
        (name, [(case, peer) for case in cases for peer in case["peers"]])
        for name, cases in operations(result["cases"]).items()
    ]
    panels = [panel for panel in panels if panel[1]] or [("no case was measured", [])]
    heights = [len(bars) + 3 for _, bars in panels]
    drawing = io.StringIO()
    with rc_context({"svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10, 0.2 * sum(heights) + 1), layout="constrained")
        axes = figure.subplots(
            len(panels), sharex=True, squeeze=False, height_ratios=heights
        ).ravel()
        for axis, (name, bars) in zip(axes, panels, strict=True):
            ratios = [peer["ratio"] for _, peer in bars]
            edges = [peer["round_ratio_quartiles"] for _, peer in bars]
            # The ratio of medians may lie outside the quartiles over rounds, and a whisker cannot have
            # a negative length.
            below = [max(ratio - low, 0.0) for ratio, (low, _) in zip(ratios, edges, strict=True)]
            above = [max(high - ratio, 0.0) for ratio, (_, high) in zip(ratios, edges, strict=True)]
            labels = [f"{subject(case)}: {peer['name']}" for case, peer in bars]
            colours = ["tab:red" if ratio < 1 else "tab:blue" for ratio in ratios]
            rows = range(len(bars))
            lengths = [ratio - 1 for ratio in ratios]
            axis.barh(rows, lengths, left=1, xerr=(below, above), color=colours, ecolor="gray")
            axis.set(xscale="log", title=name, yticks=rows, yticklabels=labels)
            axis.axvline(1, color="black", linewidth=0.8)
            axis.invert_yaxis()
        axes[-1].set_xlabel("times as fast as the peer")
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    svg = drawing.getvalue()
    return svg[svg.index("<svg") :]
