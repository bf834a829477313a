"""The command line: ``python -m steadygrad doctor | bench | study``.

Each command calls one module and turns its outcome into an exit code: 0 when all is well, 1 when
something failed, 2 when the command was not understood, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .console import CannotPrint, Console, PlainConsole, open_console
from .doctor import installed_version
from .doctor import run as run_doctor
from .prerequisites import find_problem


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: arguments after the program's name; ``sys.argv[1:]`` by default.

    Raises:
        SystemExit: with code 2 for arguments that are not understood, with 0 after ``--help``.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if problem := _contradiction(args) or _prepare_out(args):
        parser.error(f"{args.command}: {problem}")
    if args.command != "doctor" and (problem := find_problem()):
        PlainConsole(stderr=True).print(problem)
        return 1
    try:
        return _COMMANDS[args.command](args, open_console())
    except CannotPrint as error:
        _drop_output()
        open_console(stderr=True).print(f"{args.command}: standard output takes nothing: {error}")
        return 1
    except BrokenPipeError:  # a reader such as head has seen enough
        _drop_output()
        return 1
    except KeyboardInterrupt:
        open_console(stderr=True).print("\nInterrupted.")
        return 130
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        missing = f"{args.command} needs rich: pip install rich"
        open_console(stderr=True).print(missing)
        return 1


def _drop_output() -> None:
    """What still waits for standard output goes nowhere: Python would fail for it once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _doctor(args: argparse.Namespace, console: Console) -> int:
    return run_doctor(PlainConsole())


def _bench(args: argparse.Namespace, console: Console) -> int:
    if args.result is not None:
        return _bench_page(args.result, args.page, console)
    from .bench import DeviceUnusable, run

    try:
        return run(
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


def _bench_page(result: Path, page: Path, console: Console) -> int:
    from .bench.page import read_result, write_page

    try:
        write_page(read_result(result), page)
    except (OSError, ValueError) as error:
        open_console(stderr=True).print(str(error))
        return 1
    console.print(f"Page written to {page}")
    return 0


def _study(args: argparse.Namespace, console: Any) -> int:
    from .study import EXPERIMENTS, Selection, Settings, run_study
    from .study.selection import Mode

    if args.list:
        for experiment in EXPERIMENTS:
            arms = ", ".join(arm.name for arm in experiment.arms)
            console.print(f"{experiment.name}: {experiment.title}", markup=False)
            console.print(f"  arms: {arms}", markup=False)
        return 0
    if args.report:
        return _study_report(args)
    mode: Mode = "quick" if args.quick else "full" if args.full else "default"
    selection = Selection(tuple(args.names), mode, args.seeds or 0, args.arms, args.data)
    settings = Settings(args.out, args.jobs, args.threads, args.limit, args.restart)
    return run_study(selection, settings, console)


def _study_report(args: argparse.Namespace) -> int:
    from .study.runner import report_again

    console: Any = open_console(stderr=True)
    return report_again(args.report, args.out, console)


def _contradiction(args: argparse.Namespace) -> str:
    """What cannot be asked for at once."""
    if args.command == "study":
        if args.quick and args.full:
            return "--quick and --full: expected one of them"
        if args.quick and (args.names or args.data):
            return "--quick: is an experiment of its own; leave out the others and --data"
    if args.command == "bench" and args.result is not None:
        if args.page is None:
            return "--from makes a page of a result: add --page FILE"
        measuring = {"--quick": args.quick, "--out": args.out, "--limit": args.limit}
        measuring |= {"--targets": args.targets, "--threads": args.threads, "--device": args.device}
        given = [name for name, value in measuring.items() if value]
        return f"--from measures nothing: leave out {', '.join(given)}" if given else ""
    return ""


def _prepare_out(args: argparse.Namespace) -> str:
    """Make the folders that results go to; return what is wrong with them, before minutes of work."""
    if args.command == "doctor":
        return ""
    if args.command == "study":
        return "" if args.list else _prepare_folder("--out", args.out, args.out)
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


_COMMANDS = {"doctor": _doctor, "bench": _bench, "study": _study}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="steadygrad",
        description="Fused gradient clipping, penalties and optimizer steps for PyTorch.",
    )
    version = f"steadygrad {installed_version('steadygrad')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    commands.add_parser(
        "doctor",
        help="show versions and backends, check every kernel, say what to do",
        description="Show what is installed, check every kernel against its definition in NumPy, "
        "and say what to do about anything that is wrong. Exits with 1 if something is.",
    )

    bench = commands.add_parser(
        "bench",
        help="time the kernels side by side with torch",
        description="Time the kernels side by side with torch, in one process, interleaved.",
    )
    bench.add_argument("--quick", action="store_true", help="fewer cases and repetitions")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="where to run (default: cpu)")
    bench.add_argument(
        "--limit", type=_seconds, metavar="SECONDS", help="begin no further case after this time"
    )
    bench.add_argument("--out", type=Path, metavar="FILE", help="also write the numbers as JSON")
    bench.add_argument(
        "--page", type=Path, metavar="FILE", help="also write a page of charts and tables (HTML)"
    )
    bench.add_argument(
        "--targets", action="store_true", help="also show the floors that maintainers hold it to"
    )
    bench.add_argument(
        "--from",
        dest="result",
        type=Path,
        metavar="FILE",
        help="measure nothing: make the page of numbers that --out wrote before",
    )
    _add_threads(bench, default=2)

    study = commands.add_parser(
        "study",
        help="train networks that explode, with and without remedies",
        description="Train networks that explode, with and without remedies, on real data, and "
        "compare the remedies. Writes the numbers (study.json) and pages made of them. A study that "
        "was killed, interrupted or out of time goes on where it was with the same command.",
    )
    study.add_argument(
        "names",
        nargs="*",
        metavar="EXPERIMENT",
        help="name of an experiment, or a Python file with one of your own (default: all)",
    )
    study.add_argument("--list", action="store_true", help="show experiments and arms, and stop")
    study.add_argument("--quick", action="store_true", help="one network, two minutes")
    study.add_argument("--full", action="store_true", help="ten seeds, and longer problems")
    study.add_argument("--seeds", type=_count, metavar="N", help="number of seeds (default: 5)")
    study.add_argument(
        "--arms",
        type=lambda text: tuple(part.strip() for part in text.split(",")),
        default=(),
        metavar="ARM,...",
        help="these remedies alone, and none",
    )
    study.add_argument("--data", metavar="DIR", help="folder with MNIST or CIFAR-10 files")
    study.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="folder (default: out)"
    )
    study.add_argument(
        "--jobs", type=_count, metavar="N", help="processes side by side (default: one per core)"
    )
    study.add_argument(
        "--limit", type=_seconds, metavar="SECONDS", help="begin no further run after this time"
    )
    study.add_argument(
        "--restart", action="store_true", help="drop what a study has left in the folder"
    )
    study.add_argument(
        "--report",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="make the pages from results that are there, and stop",
    )
    _add_threads(study, default=1)
    return parser


def _add_threads(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument(
        "--threads", type=_count, metavar="N", help=f"CPU threads (default: {default})"
    )


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
