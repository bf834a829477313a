"""Run ``python -m benchmarks``, which times our operations beside torch's."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from benchmarks.measure import FAILED, CudaDevice, DeviceUnusable, HostDevice, measure_all
from benchmarks.rehearsal import EmulatedDevice
from benchmarks.report import render, show, write_page
from benchmarks.results import RESULTS, Result, read_result
from study.command_line import count, folder_problem, guarded, seconds
from study.record import write_text

DEVICES = {"cpu": HostDevice, "cuda": CudaDevice, "emulated": EmulatedDevice}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit code.

    Returns:
        0 on success, 1 when something failed, 130 after Ctrl-C. A missed floor is no failure.

    Raises:
        SystemExit: With code 2 for arguments that are not understood, with 0 after ``--help``.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if problem := _contradiction(args):
        parser.error(problem)
    for option, file in (("--out", args.out), ("--page", args.page)):
        if file is not None and file.is_dir():
            parser.error(f"{option} {file}: is a folder; name a file")
        if file is not None and (problem := folder_problem(f"{option} {file}", file.parent)):
            parser.error(problem)
    return guarded("benchmarks", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    before = torch.get_num_threads()
    try:
        if args.result is not None:
            result = read_result(args.result)
        else:
            # The result describes the run, including its threads, so they are set first.
            torch.set_num_threads(args.threads or min(2, os.cpu_count() or 1))
            device = DEVICES[args.device or "cpu"]()
            result = measure(device, quick=args.quick, limit=args.limit, out=args.out)
            show(Console(), render(result, args.targets))
    except (DeviceUnusable, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    finally:
        torch.set_num_threads(before)
    if args.page is not None:
        write_page(result, args.page, args.targets)
    written = [file for file in (args.out, args.page) if file is not None]
    for file in written:
        Console().print(f"Written to {file}", soft_wrap=True, markup=False, highlight=False)
    return int(any(entry["reason"].startswith(FAILED) for entry in result["skipped"]))


def measure(
    device: HostDevice, *, quick: bool, limit: float | None = None, out: Path | None = None
) -> Result:
    """Measure the cases of a device with a progress bar, and write the numbers to `out` after each.

    The bar is redrawn between cases only, since a thread that redraws it would wake up inside timed
    regions.
    """
    total = sum(case.quick or not quick for case in device.plan)
    result: Result = {}
    with Progress(
        *(*Progress.get_default_columns(), MofNCompleteColumn()),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as progress:
        bar = progress.add_task("copy bandwidth", total=total)

        def begin(key: str) -> None:
            progress.update(
                bar, description=key, completed=len(result.get("cases", ())), refresh=True
            )

        for result in measure_all(device, quick=quick, limit=limit, on_case=begin):
            if out is not None:
                write_text(json.dumps(result, indent=2) + "\n", out)
    return result


def _contradiction(args: argparse.Namespace) -> str:
    """Return a message about options that exclude each other; "" if there are none."""
    if args.device == "emulated" and args.out and args.out.resolve().parent == RESULTS:
        return "--out: a rehearsal must not be written to the results"
    if args.result is None:
        return ""
    if args.page is None:
        return "--from makes a page of a result: add --page FILE"
    names = ("quick", "out", "limit", "threads", "device")
    given = [f"--{name}" for name in names if getattr(args, name)]
    return f"--from measures nothing: leave out {', '.join(given)}" if given else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks",
        description="Time the kernels beside torch in one process, taking turns.",
    )
    option = parser.add_argument
    option("--quick", action="store_true", help="fewer cases and repetitions")
    option("--device", choices=DEVICES, help="where to run (default: cpu); emulated only rehearses")
    option("--limit", type=seconds, metavar="SECONDS", help="begin no case after this time")
    option("--out", type=Path, metavar="FILE", help="write the numbers as JSON, after each case")
    option("--page", type=Path, metavar="FILE", help="also draw the ratios and tables (HTML)")
    option(
        "--targets",
        action="store_true",
        help="also show whether the floors for maintainers are met",
    )
    again = "measure nothing, and make the page from a file that --out wrote"
    option("--from", dest="result", type=Path, metavar="FILE", help=again)
    option("--threads", type=count, metavar="N", help="CPU threads (default: 2)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
