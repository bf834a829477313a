"""What the rows say, in sentences: computed from them and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from .experiment import Experiment
from .outcome import listed
from .summary import Row
from .tasks import Metric


def conclusions(rows: Sequence[Row], metric: Metric) -> list[tuple[str, str]]:
    """Say in a sentence what each arm did; the first arm is the baseline.

    Args:
        rows: of one problem.
        metric: of that problem.

    Returns:
        Pairs of an arm's name and its sentence.
    """
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(row.arm, []).append(row)
    baseline = next(iter(arms.values()), [])
    return [
        (name, _sentence(own, None if own is baseline else baseline, metric))
        for name, own in arms.items()
    ]


def _sentence(rows: list[Row], baseline: list[Row] | None, metric: Metric) -> str:
    parts = [_counts(rows, baseline)]
    blown = [row for row in rows if row.nonfinite_steps]
    if blown:
        steps = [step for row in blown for step in row.nonfinite_steps]
        tried = sum(row.runs for row in blown)
        parts.append(
            f"at {_rates(blown)} the loss of {len(steps)} of {tried} runs blew up "
            f"({_at_steps(steps)})"
        )
    risen = [row for row in rows if row.survived.count + len(row.nonfinite_steps) < row.runs]
    if risen:
        parts.append(f"at {_rates(risen)} it stayed finite but ended no lower than it began")
    idle = [row for row in rows if row.survived.count > row.learned.count == 0]
    if idle:
        parts.append(f"at {_rates(idle)} it survived without learning")
    best = best_row([row for row in rows if row.learned.count == row.runs], metric)
    if best is None or best.metric is None:
        parts.append("at no learning rate did every seed learn")
    else:
        parts.append(
            f"it learned best at {best.learning_rate:g}, with a {metric.name} of "
            + short(best.metric.mean)
            if metric.better == "higher"
            else f"it learned best at {best.learning_rate:g}, with {short(best.metric.mean)} "
            + metric.name
        )
    return "; ".join(parts) + "."


def best_row(rows: Sequence[Row], metric: Metric) -> Row | None:
    """Return the row with the best mean of the metric, None where there is none."""
    sign = 1.0 if metric.better == "higher" else -1.0
    known = [row for row in rows if row.metric is not None]
    return max(known, key=lambda row: sign * (row.metric.mean if row.metric else 0.0), default=None)


def findings(experiment: Experiment, rows: Sequence[Row], metrics: dict[str, Metric]) -> list[str]:
    """Compare the fixed limits with the limits that are learnt, where an experiment has both.

    For each problem and learning rate: the best fixed limit, which has to be searched for, and by
    how much each policy at its defaults is worse or better.
    """
    own_arms = [arm for arm in experiment.arms if arm.twin is None]
    learnt = [a.name for a in own_arms if a.clip is not None]
    fixed = {a.name for a in own_arms if a.remedy == "clipping" and a.name not in learnt}
    if not fixed or not learnt:
        return []
    found = []
    for problem in experiment.problems:
        metric = metrics[problem.name]
        for learning_rate in experiment.learning_rates:
            own = [
                row
                for row in rows
                if (row.problem, row.learning_rate) == (problem.name, learning_rate)
            ]
            best = best_row([row for row in own if row.arm in fixed and _is_finite(row)], metric)
            if best is None or best.metric is None:
                continue
            beside = [
                f"{name} {_compared(row, best.metric.mean, metric)}"
                for name in learnt
                for row in own
                if row.arm == name
            ]
            if beside:
                found.append(
                    f"{problem.name}, learning rate {learning_rate:g}: the best fixed limit is that "
                    f"of {best.arm}, with {short(best.metric.mean)} {metric.name}. "
                    f"Beside it: {', '.join(beside)}."
                )
    return found


def _is_finite(row: Row) -> bool:
    return row.metric is not None and len(row.metric.values) == row.runs


def _compared(row: Row, best: float, metric: Metric) -> str:
    """By what share a row is worse than ``best``, or better."""
    if row.metric is None:
        return "without a finite result"
    difference = row.metric.mean - best
    worse = difference < 0 if metric.better == "higher" else difference > 0
    share = f"{abs(difference / best):.1%}" if best else short(abs(difference))
    text = "as good" if share in ("0.0%", ".00") else f"{share} {'worse' if worse else 'better'}"
    finite = len(row.metric.values)
    return (
        text
        if finite == row.runs
        else f"{text} in the {finite} of {row.runs} runs that ended finite"
    )


def _counts(rows: list[Row], baseline: list[Row] | None) -> str:
    learned = sum(row.learned.count for row in rows)
    counts = f"{_survivors(rows)} runs survived and {learned} learned"
    if baseline is None:
        return counts
    rates = {row.learning_rate for row in rows}
    theirs = [row for row in baseline if row.learning_rate in rates]
    return f"{counts} ({baseline[0].arm}: {_survivors(theirs)} survived)"


def _survivors(rows: list[Row]) -> str:
    return f"{sum(row.survived.count for row in rows)} of {sum(row.runs for row in rows)}"


def short(value: float) -> str:
    """Two digits after the point, without a zero before it."""
    return f"{value:.2f}".removeprefix("0")


def _rates(rows: list[Row]) -> str:
    rates = listed([f"{row.learning_rate:g}" for row in rows])
    return f"learning rate{'s' if len(rows) > 1 else ''} {rates}"


def _at_steps(steps: list[int]) -> str:
    low, high = min(steps), max(steps)
    return f"at step {low}" if low == high else f"at steps {low} to {high}"
