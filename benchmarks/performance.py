"""Write docs/performance.md from the newest result file of each machine: `make performance`."""

from __future__ import annotations

import re
import sys

from benchmarks.environment import ROOT, git
from benchmarks.results import Result, newest_results, operations
from benchmarks.tables import TEMPLATES, amount, floor, milliseconds, moved, subject, verdict

PAGE = ROOT / "docs" / "performance.md"

# Lines that depend on the present kernels, and not on the result files alone, begin with this.
STALENESS = "**These figures are older than the kernels"


def page(results: dict[str, Result], csrc_tree: str | None) -> str:
    """Return the page as Markdown.

    Args:
        results: Newest result of each machine.
        csrc_tree: Hash that git gives the kernels as they are now; None if git does not say.
    """
    gpus = {name: result for name, result in results.items() if result["environment"].get("gpu")}
    words = (operations, floor, subject, milliseconds, moved, amount, verdict)
    text = TEMPLATES.get_template("performance.md.jinja").render(
        gpus=gpus,
        machines={**gpus, **results},
        csrc_tree=csrc_tree,
        staleness=STALENESS,
        **{function.__name__: function for function in words},
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def settled(text: str) -> str:
    """Return the page without the lines that the next commit may change."""
    return re.sub(rf"^{re.escape(STALENESS)}.*\n\n", "", text, flags=re.MULTILINE)


def main() -> int:
    PAGE.write_text(page(newest_results(), git(ROOT, "rev-parse", "HEAD:csrc")), encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)} written\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
