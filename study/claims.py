"""What the articles claim of each remedy, and what the rows say of it.

The articles' claims are fixed; every verdict and every number is computed from the record.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from study.pages import Bullets, Cell, Paragraph, Section, Table

from . import outcome
from .experiment_section import arm_cell
from .outcome import Json, Tally, listed

# A remedy that is left out, where all other arms have it: what it says is read the other way round.
_LEFT_OUT = "raw data"
# A remedy of a user's own stands for itself.
_CLAIMS = {
    "clipping": "Clipping gradients keeps them from exploding",
    "adaptive clipping": "Clipping at a limit that adjusts itself keeps gradients from exploding",
    "skipping": "Leaving out steps whose gradient norm is a spike keeps gradients from exploding",
    "penalty": "L1 and L2 penalties on the parameters keep gradients from exploding",
    "activation penalty": "Penalties on activations keep gradients from exploding",
    "batch norm": "Batch normalization keeps gradients from exploding",
    "dropout": "Dropout keeps gradients from exploding",
    "initialisation": "A suitable initialisation keeps gradients from exploding",
    "activation": "The choice of the activation function keeps gradients from exploding",
    "schedule": "Learning-rate schedules keep gradients from exploding",
    "dynamic adjustment": "Adjusting the learning rate to what happens keeps gradients from exploding",
    "accumulation": "Accumulating gradients keeps them from exploding",
    "weight decay": "Weight decay keeps gradients from exploding",
    "data": "Augmented data keep gradients from exploding",
    _LEFT_OUT: "Normalised data keep gradients from exploding",
    "early stopping": "Early stopping keeps gradients from exploding",
    "combination": "Remedies together keep gradients from exploding",
}
HELD, IN_PART, NOT = "held", "held in part", "did not hold"
# Gradients that vanish do not explode.
STILL = "no explosion, but no training either"
UNTESTED, UNCLEAR = "not put to the test", "no clear difference"
MIXED = "better here, worse there"


def arms(experiments: Sequence[Json]) -> dict[str, str]:
    """The remedies of all experiments: name of the arm -> its remedy; without the baselines."""
    found: dict[str, str] = {}
    for experiment in experiments:
        for arm in outcome.remedies(experiment):
            if arm["name"] != outcome.baseline(experiment):
                found.setdefault(arm["name"], arm["remedy"])
    return found


def hard_tally(experiments: Sequence[Json], arm: str) -> Tally:
    """The runs of an arm in the hard settings of all experiments."""
    total = Tally()
    for experiment in experiments:
        total += outcome.tally(experiment, arm, outcome.hard_settings(experiment))
    return total


def prevention(experiments: Sequence[Json], arm: str, remedy: str) -> tuple[str, str]:
    """What the runs say of the claim that a remedy keeps training from exploding.

    Returns:
        The verdict, and the numbers behind it.
    """
    if remedy == _LEFT_OUT:
        return _by_leaving_out(experiments, arm)
    found = hard_tally(experiments, arm)
    hard = sum(len(outcome.hard_settings(experiment)) for experiment in experiments)
    where = "" if found.settings == hard else f" in {found.settings} of {hard} hard settings"
    numbers = f"{found.kept} of {found.runs} runs kept{where}, {found.learned} learned"
    verdict = _verdict(found.kept, found.runs)
    if verdict == NOT and not found.exploded:
        verdict = STILL
    return verdict, numbers if found.runs else ""


def _by_leaving_out(experiments: Sequence[Json], arm: str) -> tuple[str, str]:
    found = Tally()
    for experiment in experiments:
        hard = outcome.hard_settings(experiment)
        kept = [setting for setting in outcome.settings(experiment) if setting not in hard]
        found += outcome.tally(experiment, arm, kept)
    lost = found.runs - found.kept
    numbers = f"without it {lost} of {found.runs} runs lost where the baseline's are kept"
    return _verdict(lost, found.runs), numbers if found.runs else ""


def _verdict(good: int, runs: int) -> str:
    if not runs:
        return UNTESTED
    if good == runs:
        return HELD
    return IN_PART if 2 * good >= runs else NOT


def generalisation(experiments: Sequence[Json], arm: str, remedy: str) -> tuple[str, str]:
    """What the runs say of the claim that a remedy helps on held-out data.

    Returns:
        The verdict, and the numbers behind it.
    """
    above, below, neither = _compared(experiments, arm)
    total = above + below + neither
    if not total:
        return UNTESTED, ""
    where = "1 setting" if total == 1 else f"{total} settings"
    numbers = f"of {where} better in {above}, worse in {below}"
    if remedy == _LEFT_OUT:
        numbers = f"without it: {numbers}"
        above, below = below, above
    if not above:
        return (NOT if below else UNCLEAR), numbers
    if below:
        return MIXED, numbers
    return (HELD if above == total else IN_PART), numbers


def _compared(experiments: Sequence[Json], arm: str) -> tuple[int, int, int]:
    counts = [outcome.clearly(experiment, arm) for experiment in experiments]
    above, below, neither = (sum(column) for column in zip(*counts, strict=True))
    return above, below, neither


def section(experiments: Sequence[Json]) -> Section:
    """The claims, remedy by remedy, in words and as a table."""
    items: dict[str, dict[str, list[str]]] = {}
    rows: list[Sequence[str | Cell]] = []
    for name, remedy in arms(experiments).items():
        verdict, numbers = prevention(experiments, name, remedy)
        helped, counts = generalisation(experiments, name, remedy)
        said = f"{name} ({numbers})" if numbers else name
        items.setdefault(remedy, {}).setdefault(verdict, []).append(said)
        cells = (Cell(verdict, numbers, _tone(verdict)), Cell(helped, counts, _tone(helped)))
        rows.append((arm_cell(name, remedy), *cells))
    claims = [
        (
            _CLAIMS.get(remedy, f"{remedy} keeps gradients from exploding"),
            "; ".join(
                f"{verdict} for {listed(verdicts[verdict])}"
                for verdict in (HELD, IN_PART, NOT, STILL, UNTESTED)
                if verdict in verdicts
            )
            + ".",
        )
        for remedy, verdicts in items.items()
    ]
    headings = ("remedy", "keeps training from exploding", "helps on held-out data")
    return Section(
        "What the articles claim, and what held",
        [
            Bullets(claims),
            Paragraph(f"{outcome.MEANING} {_where(experiments)} {_RULES}", quiet=True),
            Table(headings, rows, "ttt", style="prose"),
        ],
    )


_RULES = (
    "A claim held for a remedy that kept every run in the hard settings in which it was tried, in part "
    "if it kept at least half of them. On held-out data a remedy is better or worse where the 95 % "
    "interval of its difference to the baseline, seed by seed, is above or below 0, in settings in "
    "which every run of the baseline learned; of a hundred remedies that change nothing about five "
    "would seem to. Every remedy was tried at one strength, that of its row below."
)


def _where(experiments: Sequence[Json]) -> str:
    places = []
    for experiment in experiments:
        if hard := len(outcome.hard_settings(experiment)):
            places.append(
                f"{experiment['name']} ({hard} of {len(outcome.settings(experiment))} settings)"
            )
    return f"Hard settings: {listed(places)}." if places else "No setting was hard."


def advice(experiments: Sequence[Json]) -> list[tuple[str, str]]:
    """What to reach for when: pairs of a heading and a sentence."""
    chosen = [name for name, remedy in arms(experiments).items() if remedy != _LEFT_OUT]
    return [*_for_explosions(experiments, chosen), *_for_held_out_data(experiments, chosen)]


def _for_explosions(experiments: Sequence[Json], names: Sequence[str]) -> list[tuple[str, str]]:
    tallies = {name: hard_tally(experiments, name) for name in names}
    tried = {name: found for name, found in tallies.items() if found.runs}
    if not tried:
        return [
            (
                "",
                "No setting was hard: in each, more than half of the runs are kept without a remedy.",
            )
        ]
    most = max(found.settings for found in tried.values())
    always = [name for name, found in tried.items() if found.learned == found.runs]
    learned = [name for name in always if tried[name].settings == most]
    hard = "the one hard setting" if most == 1 else f"all {most} hard settings"
    if learned:
        lead = f"In {hard} every run learned with"
        sentence = listed([_timed(experiments, name) for name in learned]) + "."
    else:
        everywhere = [name for name, found in tried.items() if found.settings == most]
        best = max(everywhere, key=lambda name: tried[name].learned / tried[name].runs)
        count = f"{tried[best].learned} of {tried[best].runs}"
        lead = f"With no single remedy did every run learn in {hard}; of those tried in all, the nearest is"
        sentence = f"{best} ({count} learned)."
    items = [(lead, sentence)]
    rest = {name: found for name, found in tried.items() if name not in always}
    groups = {
        "In the fewer hard settings in which they were tried, every run learned with": [
            name for name in always if name not in learned
        ],
        "No run was lost, but not every one learned, with": [
            name for name, found in rest.items() if found.kept == found.runs
        ],
        "Runs were lost, half of them at most, with": [
            name for name, found in rest.items() if found.kept < found.runs <= 2 * found.kept
        ],
        "More than half of the runs were lost with": [
            name for name, found in rest.items() if 2 * found.kept < found.runs and found.learned
        ],
    }
    for lead, group in groups.items():
        if group:
            counted = [f"{n} ({tried[n].learned} of {tried[n].runs} learned)" for n in group]
            items.append((lead, listed(counted) + "."))
    none = [n for n, found in rest.items() if 2 * found.kept < found.runs and not found.learned]
    if none:
        items.append(("More than half were lost, and not one learned, with", f"{listed(none)}."))
    return items


def _for_held_out_data(experiments: Sequence[Json], names: Sequence[str]) -> list[tuple[str, str]]:
    better, worse, mixed = [], [], []
    for name in names:
        above, below, neither = _compared(experiments, name)
        total = above + below + neither
        if above and not below:
            better.append(f"{name} (in {above} of {total} settings)")
        elif below and not above:
            worse.append(f"{name} (in {below} of {total} settings)")
        elif above:
            mixed.append(f"{name} (better in {above}, worse in {below} of {total} settings)")
    if not (better or worse or mixed):
        return []
    items = [
        (
            "Where every run learns without a remedy, results on held-out data are clearly better "
            "in some settings, and worse in none, with",
            listed(better or ["no remedy"]),
        ),
        (
            "They are clearly worse in some, and better in none, with",
            listed(worse or ["no remedy"]),
        ),
    ]
    if mixed:
        items.append(("They are better in some settings and worse in others with", listed(mixed)))
    return [(lead, f"{text}.") for lead, text in items]


def _timed(experiments: Sequence[Json], arm: str) -> str:
    ratios = [ratio for e in experiments for ratio in outcome.relative_time(e, arm)]
    return f"{arm} ({statistics.median(ratios):.2f} x the time of a step)" if ratios else arm


def _tone(word: str) -> str:
    return {HELD: "good", NOT: "bad"}.get(word, "")
