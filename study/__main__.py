"""``python -m study``: the comparison of remedies on real data."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from .examine import main as examine
from .experiments import EXPERIMENTS
from .runner import Settings, report_again, run_study
from .selection import Mode, Selection


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study and return its exit code.

    Returns:
        0 when all is well, 1 when something failed, 130 after Ctrl-C.

    Raises:
        SystemExit: with code 2 for arguments that are not understood, with 0 after ``--help``.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["examine"]:
        return examine(given[1:])
    parser = _parser()
    args = parser.parse_args(given)
    if args.quick and args.full:
        parser.error("--quick and --full: expected one of them")
    if args.quick and (args.names or args.data):
        parser.error("--quick: is an experiment of its own; leave out the others and --data")
    if not args.list and (problem := _prepare_folder(args.out)):
        parser.error(problem)
    try:
        return _run(args, Console(file=_Output(sys.stdout)))  # type: ignore[arg-type]
    except _CannotPrintError as error:
        _drop_output()
        print(f"study: standard output takes nothing: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except BrokenPipeError:  # a reader such as head has seen enough
        _drop_output()
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)  # noqa: T201
        return 130


def _run(args: argparse.Namespace, console: Console) -> int:
    if args.list:
        for experiment in EXPERIMENTS:
            arms = ", ".join(arm.name for arm in experiment.arms)
            console.print(f"{experiment.name}: {experiment.title}\n  arms: {arms}", markup=False)
        return 0
    if args.report:
        return report_again(args.report, args.out, Console(stderr=True))
    mode: Mode = "quick" if args.quick else "full" if args.full else "default"
    selection = Selection(tuple(args.names), mode, args.seeds or 0, args.arms, args.data)
    settings = Settings(args.out, args.jobs, args.threads, args.limit, args.restart)
    return run_study(selection, settings, console)


class _CannotPrintError(Exception):
    """Raised where standard output takes nothing, as on a full disk; its text is the system's reason."""


class _Output:
    """A stream whose errors can be told from those of other files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """The stream's, flushed."""
        try:
            count = self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _CannotPrintError(error.strerror) from error
        return count

    def flush(self) -> None:
        """Nothing: every write is."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _drop_output() -> None:
    """What still waits for standard output goes nowhere: Python would fail for it once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _prepare_folder(folder: Path) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"--out {folder}: {error.strerror}; name another place"
    return "" if os.access(folder, os.W_OK) else f"--out {folder}: cannot be written; name another"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="study",
        description="Train networks that explode, with and without remedies, on real data, and "
        "compare the remedies. Writes the numbers (study.json) and pages made of them. A study that "
        "was killed, interrupted or out of time goes on where it was with the same command.",
    )
    add = parser.add_argument
    names = "name of an experiment, or a Python file with one of your own (default: all)"
    add("names", nargs="*", metavar="EXPERIMENT", help=names)
    add("--list", action="store_true", help="show experiments and arms, and stop")
    add("--quick", action="store_true", help="one network, two minutes")
    add("--full", action="store_true", help="ten seeds, and longer problems")
    add("--seeds", type=_count, metavar="N", help="number of seeds (default: 5)")
    arms = "these remedies alone, and none"
    add("--arms", type=_words, default=(), metavar="ARM,...", help=arms)
    add("--data", metavar="DIR", help="folder with MNIST or CIFAR-10 files")
    out = Path("out")
    add("--out", type=Path, default=out, metavar="DIR", help="folder (default: out)")
    jobs = "processes side by side (default: one per core)"
    add("--jobs", type=_count, metavar="N", help=jobs)
    limit = "begin no further run after this time"
    add("--limit", type=_seconds, metavar="SECONDS", help=limit)
    add("--restart", action="store_true", help="drop what a study has left in the folder")
    report = "make the pages from results that are there, and stop"
    add("--report", type=Path, nargs="+", metavar="FILE", help=report)
    add("--threads", type=_count, metavar="N", help="CPU threads of a process (default: 1)")
    return parser


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


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
