"""``python -m benchmarks``: our operations side by side with torch's."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import run
from benchmarks.device import DeviceUnusable
from benchmarks.page import read_result, write_page
from study.console import CannotPrint, Console, open_console


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit code.

    Returns:
        0 when all is well, 1 when something failed, 130 after Ctrl-C.

    Raises:
        SystemExit: with code 2 for arguments that are not understood, with 0 after ``--help``.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if problem := _contradiction(args) or _prepare_out(args):
        parser.error(problem)
    try:
        return _run(args, open_console())
    except CannotPrint as error:
        _drop_output()
        open_console(stderr=True).print(f"benchmarks: standard output takes nothing: {error}")
        return 1
    except BrokenPipeError:  # a reader such as head has seen enough
        _drop_output()
        return 1
    except KeyboardInterrupt:
        open_console(stderr=True).print("\nInterrupted.")
        return 130


def _run(args: argparse.Namespace, console: Console) -> int:
    if args.result is not None:
        return _page(args.result, args.page, console)
    try:
        return run.run(
            console,
            quick=args.quick,
            out=args.out,
            page=args.page,
            threads=args.threads,
            device=args.device or "cpu",
            limit=args.limit,
            targets=args.targets,
        )
    except DeviceUnusable as error:
        open_console(stderr=True).print(str(error))
        return 1


def _page(result: Path, page: Path, console: Console) -> int:
    try:
        write_page(read_result(result), page)
    except (OSError, ValueError) as error:
        open_console(stderr=True).print(str(error))
        return 1
    console.print(f"Page written to {page}")
    return 0


def _contradiction(args: argparse.Namespace) -> str:
    """Return what cannot be asked for at once."""
    if args.result is None:
        return ""
    if args.page is None:
        return "--from makes a page of a result: add --page FILE"
    measuring = {"--quick": args.quick, "--out": args.out, "--limit": args.limit}
    measuring |= {"--targets": args.targets, "--threads": args.threads, "--device": args.device}
    given = [name for name, value in measuring.items() if value]
    return f"--from measures nothing: leave out {', '.join(given)}" if given else ""


def _prepare_out(args: argparse.Namespace) -> str:
    """Make the folders that results go to; return what is wrong with them, before minutes of work."""
    for option, file in (("--out", args.out), ("--page", args.page)):
        if file is not None:
            if file.is_dir():
                return f"{option} {file}: is a folder; name a file"
            if problem := _prepare_folder(option, file, file.parent):
                return problem
    return ""


def _prepare_folder(option: str, value: Path, folder: Path) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"{option} {value}: {error.strerror}; name another place"
    if not os.access(folder, os.W_OK):
        return f"{option} {value}: {folder} cannot be written; name another place"
    return ""


def _drop_output() -> None:
    """What still waits for standard output goes nowhere: Python would fail for it once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks",
        description="Time the kernels side by side with torch, in one process, interleaved.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and repetitions")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run (default: cpu)")
    parser.add_argument(
        "--limit", type=_seconds, metavar="SECONDS", help="begin no further case after this time"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the numbers as JSON")
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="also write a page of charts and tables (HTML)"
    )
    parser.add_argument(
        "--targets", action="store_true", help="also show the floors that maintainers hold it to"
    )
    parser.add_argument(
        "--from",
        dest="result",
        type=Path,
        metavar="FILE",
        help="measure nothing: make the page of numbers that --out wrote before",
    )
    parser.add_argument("--threads", type=_count, metavar="N", help="CPU threads (default: 2)")
    return parser


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return count


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0.0:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return seconds


if __name__ == "__main__":
    raise SystemExit(main())
