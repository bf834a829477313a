"""``python -m benchmarks``: our operations side by side with torch's."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.measure import FAILED, DeviceUnusable, HostDevice, device_named, measure_all
from benchmarks.page import write_page
from benchmarks.rehearsal import EmulatedDevice
from benchmarks.results import RESULTS, Result, read_result
from benchmarks.tables import render, show


class CannotPrint(Exception):
    """Raised where standard output takes nothing, as on a full disk; its text is the system's reason."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit code.

    Returns:
        0 when all is well, 1 when something failed, 130 after Ctrl-C. A floor that is missed is no failure.

    Raises:
        SystemExit: with code 2 for arguments that are not understood, with 0 after ``--help``.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if problem := _contradiction(args) or _prepare_out(args):
        parser.error(problem)
    errors = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    try:
        return _run(args)
    except (DeviceUnusable, ValueError) as error:
        errors.print(str(error))
    except CannotPrint as error:
        # What still waits for standard output goes nowhere: Python would fail for it once more at its end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        errors.print(f"benchmarks: standard output takes nothing: {error}")
    except KeyboardInterrupt:
        errors.print("\nInterrupted.")
        return 130
    return 1


def _run(args: argparse.Namespace) -> int:
    if args.result is not None:
        result = read_result(args.result)
    else:
        # The device describes the run, its threads among the rest.
        with _threads(args.threads or min(2, os.cpu_count() or 1)):
            rehearses = args.device == "emulated"
            device = EmulatedDevice() if rehearses else device_named(args.device or "cpu")
            result = measure(device, quick=args.quick, limit=args.limit, out=args.out)
        _say(render(result, args.targets))
    if args.out is not None:
        _say([f"Numbers written to {args.out}"])
    if args.page is not None:
        write_page(result, args.page, args.targets)
        _say([f"Page written to {args.page}"])
    return int(any(entry["reason"].startswith(FAILED) for entry in result["skipped"]))


def _say(parts: Iterable[RenderableType]) -> None:
    try:
        show(Console(), parts)
    except OSError as error:
        raise CannotPrint(error.strerror) from error


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(
    device: HostDevice, *, quick: bool, limit: float | None = None, out: Path | None = None
) -> Result:
    """Measure the cases of a device behind a progress bar, and write the numbers to `out` after each of them.

    The bar is redrawn between rounds, a few times a second at most: its own thread would wake up inside timed regions.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    total = sum(case.quick or not quick for case in device.cases())
    result: Result = {}
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as progress:
        task = progress.add_task("copy bandwidth", total=total)
        drawn = time.monotonic()

        def begin(key: str) -> None:
            progress.update(task, description=key)
            progress.refresh()

        def redraw() -> None:
            nonlocal drawn
            if time.monotonic() - drawn > 0.5:
                progress.refresh()
                drawn = time.monotonic()

        found = measure_all(device, quick=quick, limit=limit, on_case=begin, on_round=redraw)
        for result in found:
            progress.advance(task)
            if out is not None:
                # A kill while this is written leaves the numbers of the cases before.
                beside = out.with_name(f".{out.name}")
                beside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
                beside.replace(out)
    return result


def _contradiction(args: argparse.Namespace) -> str:
    """Return what cannot be asked for at once."""
    if args.device == "emulated" and args.out and args.out.resolve().parent == RESULTS:
        return "--out: a rehearsal has no place among the results"
    if args.result is None:
        return ""
    if args.page is None:
        return "--from makes a page of a result: add --page FILE"
    measuring = {"--quick": args.quick, "--out": args.out, "--limit": args.limit}
    measuring |= {"--threads": args.threads, "--device": args.device}
    given = [name for name, value in measuring.items() if value]
    return f"--from measures nothing: leave out {', '.join(given)}" if given else ""


def _prepare_out(args: argparse.Namespace) -> str:
    """Make the folders that results go to; return what is wrong with them, before minutes of work."""
    for option, file in (("--out", args.out), ("--page", args.page)):
        if file is None:
            continue
        if file.is_dir():
            return f"{option} {file}: is a folder; name a file"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return f"{option} {file}: {error.strerror}; name another place"
        if not os.access(file.parent, os.W_OK):
            return f"{option} {file}: {file.parent} cannot be written; name another place"
    return ""


def _above_zero(kind: Callable[[str], float], expected: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = 0
        if not number > 0:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return number

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks",
        description="Time the kernels side by side with torch, in one process, interleaved.",
    )
    count = _above_zero(int, "a whole number of at least 1")
    seconds = _above_zero(float, "a number of seconds above 0")
    option = parser.add_argument
    option("--quick", action="store_true", help="fewer cases and repetitions")
    devices = ("cpu", "cuda", "emulated")
    option("--device", choices=devices, help="where to run (default: cpu); emulated only rehearses")
    option("--limit", type=seconds, metavar="SECONDS", help="begin no further case after this time")
    option("--out", type=Path, metavar="FILE", help="write the numbers as JSON, after each case")
    option("--page", type=Path, metavar="FILE", help="also draw the ratios and tables (HTML)")
    option(
        "--targets", action="store_true", help="also show the floors that maintainers hold it to"
    )
    option(
        *("--from",),
        dest="result",
        type=Path,
        metavar="FILE",
        help="measure nothing: make the page of numbers that --out wrote before",
    )
    option("--threads", type=count, metavar="N", help="CPU threads (default: 2)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
