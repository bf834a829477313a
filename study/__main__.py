"""Run ``python -m study``, which compares remedies on real data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from .command_line import count, folder_problem, guarded, seconds
from .examine import main as examine
from .experiments import EXPERIMENTS, Selection
from .runner import Settings, report_again, run_study


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study and return its exit code.

    Returns:
        0 when all is well, 1 when something failed, 130 after Ctrl-C.

    Raises:
        SystemExit: With code 2 for arguments that are not understood, with 0 after ``--help``.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["examine"]:
        return examine(given[1:])
    parser = _parser()
    args = parser.parse_args(given)
    if args.mode == "quick" and (args.names or args.data):
        parser.error("--quick is an experiment of its own; leave out other experiments and --data")
    if not args.list and (problem := folder_problem(f"--out {args.out}", args.out)):
        parser.error(problem)
    return guarded("study", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    console = Console()
    if args.list:
        for experiment in EXPERIMENTS:
            arms = ", ".join(arm.name for arm in experiment.arms)
            console.print(f"{experiment.name}: {experiment.title}\n  arms: {arms}", markup=False)
        return 0
    if args.report:
        return report_again(args.report, args.out, Console(stderr=True))
    selection = Selection(tuple(args.names), args.mode, args.seeds, args.arms, args.data)
    settings = Settings(args.out, args.jobs, args.threads, args.limit, args.restart)
    return run_study(selection, settings, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="study",
        description="Train networks that explode, with and without remedies, on real data, and "
        "compare the remedies. Writes the numbers (study.json) and pages that show them. A study that "
        "was killed, interrupted or out of time resumes when the same command is run again.",
    )
    add = parser.add_argument
    names = "name of an experiment, or a Python file with one of your own (default: all)"
    add("names", nargs="*", metavar="EXPERIMENT", help=names)
    add("--list", action="store_true", help="show experiments and arms, and stop")
    mode = parser.add_mutually_exclusive_group()
    one: Any = {"dest": "mode", "action": "store_const", "default": "default"}
    mode.add_argument("--quick", **one, const="quick", help="one network, two minutes")
    mode.add_argument("--full", **one, const="full", help="ten seeds, and longer problems")
    add("--seeds", type=count, default=0, metavar="N", help="number of seeds (default: 5)")
    arms = "run only these remedies, and the baseline"
    add("--arms", type=_words, default=(), metavar="ARM,...", help=arms)
    add("--data", metavar="DIR", help="folder with MNIST or CIFAR-10 files")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="folder (default: out)")
    add("--jobs", type=count, metavar="N", help="parallel processes (default: one per core)")
    add("--limit", type=seconds, metavar="SECONDS", help="begin no run after this time")
    add("--restart", action="store_true", help="drop an unfinished study in the folder")
    report = "make the pages from existing results, and stop"
    add("--report", type=Path, nargs="+", metavar="FILE", help=report)
    add("--threads", type=count, default=1, metavar="N", help="threads of a process (default: 1)")
    return parser


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


if __name__ == "__main__":
    raise SystemExit(main())
