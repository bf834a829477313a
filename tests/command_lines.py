"""What the tests of all command lines share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest


def run_to_exit(
    main: Callable[[Sequence[str]], int], capsys: pytest.CaptureFixture[str], *argv: str
) -> tuple[int, str]:
    """Run with arguments for which the parser exits; return the exit code and what was printed."""
    with pytest.raises(SystemExit) as info:
        main(argv)
    captured = capsys.readouterr()
    assert isinstance(info.value.code, int)
    return info.value.code, captured.out + captured.err
