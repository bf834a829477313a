"""What stands out in the numbers of an examination."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

import torch
from torch import nn

from steadygrad.examination.evidence import REMEDIES, THRESHOLDS
from steadygrad.examination.examination import Examination, Verdict
from steadygrad.examination.recording import Recorder


def judge(
    found: Examination, recorder: Recorder, model: nn.Module, lost: dict[str, float]
) -> list[Verdict]:
    """Return what stands out, the surest first.

    Args:
        found: the examination so far.
        recorder: what was seen of the layers.
        model: whose parameters are looked at.
        lost: share of the gradient that fp16 loses, by layer.
    """

    def verdict(kind: str, sure: float, number: float, text: str, remedy: str = "") -> Verdict:
        line, study = REMEDIES.get(remedy, ("", ""))
        line = line.format(max_norm=found.max_norm, rate=found.largest_stable_lr / 2)
        return Verdict(kind, sure, number, text, line, study)

    def above(kind: str, number: float) -> bool:
        return number > THRESHOLDS[kind].value

    def not_finite() -> Iterator[Verdict]:
        for name, p in model.named_parameters():
            if count := int((~p.detach().isfinite()).sum()):
                text = f"parameter {name} has {count} elements that are not finite"
                yield verdict("not finite", 1.0, count, text)
        given = recorder.layers.get(("input", 0))
        for batch, numbers in given.outputs.items() if given else ():
            if not math.isfinite(numbers.norm):
                text = f"the input of batch {batch} has elements that are not finite"
                yield verdict("not finite", 0.99, batch, text, "skip")
        outputs = {batch for batch, what, _ in recorder.broken if what == "output"}
        for batch, loss in enumerate(found.losses):
            if not math.isfinite(loss) and batch not in outputs:
                text = f"the loss of batch {batch} is not finite, though the network's outputs are"
                yield verdict("not finite", 0.98, batch, text, "skip")
                break
        for what, sure in (("output", 0.97), ("gradient", 0.96)):
            first = next((entry for entry in recorder.broken if entry[1] == what), None)
            if first is not None:
                half = first[2].dtype == torch.float16
                why = ": fp16 ends at 65,504" if half else ""
                text = (
                    f"the first {what} that is not finite is that of "
                    f"{first[2].name or 'the model'}, in batch {first[0]}{why}"
                )
                remedy = "loss scale" if half else "skip"
                yield verdict("not finite", sure, first[0], text, remedy)

    def by_depth() -> Iterator[Verdict]:
        relu = any(units.kind == "ReLU" for units in found.units)
        remedy = "initialisation" if relu else "Glorot's initialisation"
        for what, factor, steps in (
            ("activations", found.factor, found.depth),
            ("gradients", found.gradient_factor, found.depth - 1),
        ):
            each = factor ** (1 / steps) if factor > 0 and steps > 0 else math.nan
            shown = f"{each:.3g} x a layer, {factor:,.4g} x over {steps}"
            if above("growth", factor):
                text = f"{what} grow {shown}: the initialisation is too large"
                yield verdict("growth", 0.9, factor, text, remedy)
            elif 0 < factor < THRESHOLDS["vanishing"].value:
                text = f"{what} vanish, {shown}: the initialisation is too small"
                yield verdict("vanishing", 0.7, factor, text, remedy)

    def units() -> Iterator[Verdict]:
        for unit in found.units:
            where = unit.name or "the model"
            if unit.kind == "softmax":
                if unit.share < THRESHOLDS["entropy"].value:
                    text = (
                        f"the attention of {where} has {unit.share:.2g} of a uniform one's entropy"
                    )
                    yield verdict("entropy", 0.4, unit.share, text, "attention")
                continue
            kind, remedy = ("dead", "leaky") if unit.kind == "ReLU" else ("saturated", "saturated")
            if above(kind, unit.share):
                text = f"{unit.share:.0%} of the {unit.kind} units of {where} are {kind}"
                yield verdict(kind, 0.5 + 0.35 * unit.share, unit.share, text, remedy)
        for name, share in lost.items():
            if above("underflow", share):
                text = f"fp16 loses {share:.0%} of the gradient of {name}: it is below 6e-8"
                yield verdict("underflow", 0.8, share, text, "loss scale")

    def steps() -> Iterator[Verdict]:
        tried = found.trials[0] if found.trials else None
        if tried is not None and not tried.holds:
            # A clip hides what a better start removes.
            order = list(REMEDIES) if above("growth", found.factor) else ["clip", *REMEDIES]
            holding = [t.remedy for t in found.trials if t.holds]
            best = next((name for name in order if name in holding), "")
            text = (
                f"it will be lost: on a copy the loss went from {tried.losses[0]:.3g} to "
                f"{tried.losses[-1]:.3g} in {len(tried.losses)} steps"
            )
            yield verdict("lost", 0.95, tried.losses[-1], text, best)
        if tried is not None and above("first step", tried.first_step):
            text = f"the first step is {tried.first_step:,.3g} x as long as the parameters"
            yield verdict("first step", 0.85, tried.first_step, text, "clip")
        ratio = found.lr / found.largest_stable_lr if found.largest_stable_lr > 0 else math.nan
        if above("rate", ratio):
            text = f"the learning rate is {ratio:,.3g} x the largest stable one, {found.largest_stable_lr:.2g}"
            if tried is not None and tried.holds:
                text += "; a copy found a flatter place"
            sure = 0.45 if tried is not None and tried.holds else 0.6 if ratio < 5 else 0.8
            yield verdict("rate", sure, ratio, text, "learning rate")
        norms = [norm for norm in found.norms if math.isfinite(norm)] or [0.0]
        spike = max(norms) / (statistics.median(norms) or math.inf)
        if above("spike", spike):
            text = f"the largest gradient norm is {spike:,.3g} x the median: a batch is a spike"
            yield verdict("spike", 0.5, spike, text, "spikes")
        given = recorder.layers.get(("input", 0))
        if given is not None and above("inputs", given.rms):
            text = f"the inputs have a root mean square of {given.rms:.3g}: they are not normalised"
            yield verdict("inputs", 0.75, given.rms, text, "normalised data")
        unused = [p.name for p in found.parameters if p.state == "unused"]
        if unused:
            text = f"the loss does not depend on {', '.join(unused[:5])}" + ", ..." * (
                len(unused) > 5
            )
            yield verdict("unused", 0.3, len(unused), text)

    verdicts = [*not_finite(), *by_depth(), *units(), *steps()]
    return sorted(verdicts, key=lambda verdict: -verdict.sure)
