"""``python -m study``: the comparison of remedies on real data."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .console import CannotPrint, open_console
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
    if not args.list and (problem := _prepare_folder("--out", args.out, args.out)):
        parser.error(problem)
    try:
        return _run(args)
    except CannotPrint as error:
        _drop_output()
        open_console(stderr=True).print(f"study: standard output takes nothing: {error}")
        return 1
    except BrokenPipeError:  # a reader such as head has seen enough
        _drop_output()
        return 1
    except KeyboardInterrupt:
        open_console(stderr=True).print("\nInterrupted.")
        return 130


def _run(args: argparse.Namespace) -> int:
    console: Any = open_console()
    if args.list:
        for experiment in EXPERIMENTS:
            arms = ", ".join(arm.name for arm in experiment.arms)
            console.print(f"{experiment.name}: {experiment.title}", markup=False)
            console.print(f"  arms: {arms}", markup=False)
        return 0
    if args.report:
        errors: Any = open_console(stderr=True)
        return report_again(args.report, args.out, errors)
    mode: Mode = "quick" if args.quick else "full" if args.full else "default"
    selection = Selection(tuple(args.names), mode, args.seeds or 0, args.arms, args.data)
    settings = Settings(args.out, args.jobs, args.threads, args.limit, args.restart)
    return run_study(selection, settings, console)


def _drop_output() -> None:
    """What still waits for standard output goes nowhere: Python would fail for it once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _prepare_folder(option: str, value: Path, folder: Path) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"{option} {value}: {error.strerror}; name another place"
    if not os.access(folder, os.W_OK):
        return f"{option} {value}: {folder} cannot be written; name another place"
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="study",
        description="Train networks that explode, with and without remedies, on real data, and "
        "compare the remedies. Writes the numbers (study.json) and pages made of them. A study that "
        "was killed, interrupted or out of time goes on where it was with the same command.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="EXPERIMENT",
        help="name of an experiment, or a Python file with one of your own (default: all)",
    )
    parser.add_argument("--list", action="store_true", help="show experiments and arms, and stop")
    parser.add_argument("--quick", action="store_true", help="one network, two minutes")
    parser.add_argument("--full", action="store_true", help="ten seeds, and longer problems")
    parser.add_argument("--seeds", type=_count, metavar="N", help="number of seeds (default: 5)")
    parser.add_argument(
        "--arms",
        type=lambda text: tuple(part.strip() for part in text.split(",")),
        default=(),
        metavar="ARM,...",
        help="these remedies alone, and none",
    )
    parser.add_argument("--data", metavar="DIR", help="folder with MNIST or CIFAR-10 files")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="folder (default: out)"
    )
    parser.add_argument(
        "--jobs", type=_count, metavar="N", help="processes side by side (default: one per core)"
    )
    parser.add_argument(
        "--limit", type=_seconds, metavar="SECONDS", help="begin no further run after this time"
    )
    parser.add_argument(
        "--restart", action="store_true", help="drop what a study has left in the folder"
    )
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="make the pages from results that are there, and stop",
    )
    parser.add_argument(
        "--threads", type=_count, metavar="N", help="CPU threads of a process (default: 1)"
    )
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
