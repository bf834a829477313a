"""Judges the numbers of an examination, and finds what stands out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

import torch
from torch import nn

from steadygrad.examination.evidence import REMEDIES, THRESHOLDS
from steadygrad.examination.examination import Examination, Verdict
from steadygrad.examination.recording import Recorder

# Findings of these kinds make norms, steps and the sharpness large; a clip would leave the cause in place.
_CAUSES = ("growth", "saturated")


def judge(
    found: Examination, recorder: Recorder, model: nn.Module, lost: dict[str, float]
) -> list[Verdict]:
    """Returns what stands out, the surest first; ``lost`` is the share that fp16 loses, by layer."""
    judge = _Judge(found, recorder)
    verdicts = [*judge.not_finite(model), *judge.depth(), *judge.units(lost)]
    causes = [verdict for verdict in verdicts if verdict.kind in _CAUSES]
    verdicts += judge.steps(bool(causes))
    return sorted(verdicts, key=lambda verdict: -verdict.sure)


class _Judge:
    def __init__(self, found: Examination, recorder: Recorder) -> None:
        self.found, self.recorder = found, recorder
        self.input = recorder.layers.get(("input", 0))

    def verdict(
        self, kind: str, sure: float, number: float, text: str, remedy: str = ""
    ) -> Verdict:
        remedy = remedy or (THRESHOLDS[kind].remedy if kind in THRESHOLDS else "")
        line, study = REMEDIES.get(remedy, ("", ""))
        rate = self.found.largest_stable_lr / 2
        line = line.format(max_norm=self.found.max_norm, rate=rate)
        return Verdict(kind, sure, number, text, line, study)

    def above(
        self, kind: str, sure: float, number: float, text: str, remedy: str = ""
    ) -> Iterator[Verdict]:
        """Yields the verdict if its number is above the threshold of its kind."""
        if number > THRESHOLDS[kind].value:
            yield self.verdict(kind, sure, number, text, remedy)

    def not_finite(self, model: nn.Module) -> Iterator[Verdict]:
        kind = "not finite"
        for name, p in model.named_parameters():
            if count := int((~p.detach().isfinite()).sum()):
                text = (
                    f"parameter {name} is not finite, in {count:,} of {p.numel():,} elements, and "
                    "nothing that is computed from it is: load a checkpoint from before that"
                )
                yield self.verdict(kind, 1.0, count, text, "checkpoint")
        for batch, numbers in self.input.outputs.items() if self.input else ():
            if not math.isfinite(numbers.norm):
                text = f"the input of batch {batch} has elements that are not finite"
                yield self.verdict(kind, 0.99, batch, text, "skip")
        broken = {batch for batch, what, _ in self.recorder.broken if what == "output"}
        losses = [b for b, loss in enumerate(self.found.losses) if not math.isfinite(loss)]
        for batch in [batch for batch in losses if batch not in broken][:1]:
            text = f"the loss of batch {batch} is not finite, though the network's outputs are"
            yield self.verdict(kind, 0.98, batch, text, "skip")
        for place, sure in (("output", 0.97), ("gradient", 0.96)):
            first = [entry for entry in self.recorder.broken if entry[1] == place][:1]
            for batch, _, layer in first:
                half = layer.dtype == torch.float16
                text = (
                    f"the first {place} that is not finite is that of {layer.name or 'the model'}, "
                    f"in batch {batch}{', on the way back' if place == 'gradient' else ''}"
                    f"{': fp16 ends at 65,504' if half else ''}"
                )
                yield self.verdict(kind, sure, batch, text, "loss scale" if half else "")

    def depth(self) -> Iterator[Verdict]:
        found = self.found
        if any("Norm" in layer.kind for layer in found.layers):
            return  # Normalization sets the scale of what follows, whatever the weights are.
        remedy = "" if any(units.kind == "ReLU" for units in found.units) else "Glorot"
        for what, factor, steps in (
            ("activations", found.factor, found.depth),
            ("gradients", found.gradient_factor, found.depth - 1),
        ):
            name = self._steepest(factor) if what == "activations" else ""
            each = factor ** (1 / steps) if factor > 0 and steps > 0 else math.nan
            shown = f"{each:.3g} x a layer, {factor:,.4g} x over {steps}: the initialisation is too"
            yield from self.above("growth", 0.9, factor, f"{what} grow {shown} large{name}", remedy)
            if 0 < factor < THRESHOLDS["vanishing"].value:
                text = f"{what} vanish, {shown} small"
                yield self.verdict("vanishing", 0.7, factor, text, remedy)

    def _steepest(self, factor: float) -> str:
        """Names the layer that multiplies by more than all the others together, if there is one."""
        layers = [layer for layer in self.found.layers if layer.has_weight and layer.gain > 0]
        steepest = max(layers, key=lambda layer: layer.gain, default=None)
        if steepest is None or len(layers) < 3 or steepest.gain < max(10.0, factor**0.5):
            return ""
        where = f"layer {steepest.name!r} ({steepest.kind})"
        return f", above all in {where}, which alone multiplies by {steepest.gain:,.3g}"

    def units(self, lost: dict[str, float]) -> Iterator[Verdict]:
        dead = [
            u for u in self.found.units if u.kind == "ReLU" and u.share > THRESHOLDS["dead"].value
        ]
        if dead:
            behind = ", ".join(unit.name for unit in dead[1:5]) + ", ..." * (len(dead) > 5)
            text = (
                f"{dead[0].share:.0%} of the ReLU units of {dead[0].name or 'the model'} are dead"
                f"{f' (further on also of {behind})' if behind else ''}: 0 for every example, so that "
                "no gradient passes and what is before them does not learn; the bias or the weights "
                "before them put them far below 0"
            )
            yield self.verdict("dead", 0.6 + 0.35 * dead[0].share, dead[0].share, text)
        for unit in self.found.units:
            where, share = unit.name or "the model", float(unit.share)
            if unit.kind in ("tanh", "sigmoid"):
                text = (
                    f"{share:.0%} of the {unit.kind} units of {where} are saturated: they hardly "
                    "pass on a gradient, since the weights or inputs before them are too large"
                )
                yield from self.above("saturated", 0.6 + 0.35 * share, share, text)
            elif unit.kind == "softmax" and share < THRESHOLDS["entropy"].value:
                text = (
                    f"the attention of {where} has {share:.2g} of a uniform one's entropy: it looks "
                    "at one place alone"
                )
                yield self.verdict("entropy", 0.4, share, text)
        for name, share in lost.items():
            text = f"fp16 loses {share:.0%} of the gradient of {name}: it is below 6e-8"
            yield from self.above("underflow", 0.8, share, text)

    def steps(self, caused: bool) -> Iterator[Verdict]:
        found = self.found
        tried = found.trials[0] if found.trials else None
        ratio = found.lr / found.largest_stable_lr if found.largest_stable_lr > 0 else math.nan
        sure, then = (0.6 if ratio < 5 else 0.8), ""
        # If the cause has been named already, its consequences get no remedy of their own.
        follows, none = (", which follows from the above", "none") if caused else ("", "")
        if tried is not None and not tried.holds:
            # A clip only hides a cause that a better initialisation removes, so it does not come first.
            order = [*REMEDIES] if caused else ["clip", *REMEDIES]
            holding = [trial.remedy for trial in found.trials if trial.holds]
            start, steps = tried.losses[0], len(tried.losses)
            text = f"the run will be lost: tried on a copy, the loss went from {start:.3g} to "
            text += f"{tried.end:.3g} in {steps} steps"
            if ratio > 1 and not caused:
                text += f", at {ratio:,.3g} x the largest stable learning rate"
            elif tried.end <= 5 * abs(start) and not caused:
                text += ", at a rate that its curvature does not allow"
            best = next((name for name in order if name in holding), "")
            yield self.verdict("lost", 0.95, tried.end, text, best)
        elif tried is not None:
            sure, then = 0.45, "; tried on a copy, it holds all the same"
        if tried is not None:
            text = f"the first step is {tried.first_step:,.3g} x as long as the parameters{follows}"
            yield from self.above("first step", 0.65, tried.first_step, text, none)
        stable = f"the largest stable one, {found.largest_stable_lr:.2g}{follows}{then}"
        text = f"the learning rate, {found.lr:.2g}, is {ratio:,.3g} x {stable}"
        yield from self.above("rate", sure, ratio, text, none)
        norms = [norm for norm in found.norms if math.isfinite(norm)] or [0.0]
        spike = max(norms) / (statistics.median(norms) or math.inf)
        text = (
            f"the largest gradient norm is {spike:,.3g} x the median: a batch is a spike{follows}"
        )
        yield from self.above("spike", 0.5, spike, text, none)
        if self.input is not None:
            rms = self.input.rms
            text = f"the inputs have a root mean square of {rms:.3g}: they are not normalised"
            yield from self.above("inputs", 0.75, rms, text)
        unused = [p.name for p in found.parameters if p.state == "unused"]
        if unused:
            text = f"the loss does not depend on {', '.join(unused[:5])}"
            yield self.verdict("unused", 0.3, len(unused), text + ", ..." * (len(unused) > 5))
