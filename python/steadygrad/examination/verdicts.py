"""Lists what can stand out in an examination and what helps against it, and judges the numbers by that."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from steadygrad.examination.examination import Examination, Verdict
from steadygrad.examination.recording import Numbers
from steadygrad.examination.trials import STEPS


class Threshold(NamedTuple):
    """Holds a number beyond which something stands out, its source, and a remedy, a key of :data:`REMEDIES`."""

    value: float
    source: str
    remedy: str


class Remedy(NamedTuple):
    """Holds the line of code for a remedy, as in ``docs/remedies.md``, and what ``docs/study.md`` says about it."""

    line: str
    study: str = ""


# The surest findings come first; verdicts are sorted in this order, after what is not finite and a run that is lost.
THRESHOLDS = {
    # At the start of every network of the study, up to 50 layers deep, at most 0.5 are dead and 0.01 saturated.
    "dead": Threshold(0.9, "share of ReLUs; the study, docs/examine.md", "dead"),
    # The growth is 4 to 21 in the study's MLPs of 5 and 10 layers, which all survive, and 76 or more in deeper ones.
    "growth": Threshold(30.0, "over all layers; the study, docs/examine.md", "initialisation"),
    "saturated": Threshold(0.5, "share beyond 0.99; Glorot and Bengio 2010", "Glorot"),
    "underflow": Threshold(0.05, "share lost; Micikevicius et al. 2018", "loss scale"),
    "inputs": Threshold(10.0, "root mean square; LeCun et al. 1998", "normalised data"),
    "vanishing": Threshold(1e-4, "over all layers; Glorot and Bengio 2010", "initialisation"),
    "rate": Threshold(
        1.0, "lr by the largest stable one; Cohen et al. 2021, Gilmer et al. 2022", "learning rate"
    ),
    "first step": Threshold(1.0, "by the parameters' norm; You et al. 2017", "clip"),
    "spike": Threshold(10.0, "largest norm by the median; opt.report()", "spikes"),
    "entropy": Threshold(0.05, "share of a uniform one's; Zhai et al. 2023", "attention"),
}
_ORDER = ("not finite", "lost", *THRESHOLDS)
_BELOW = ("vanishing", "entropy")  # These stand out below their thresholds.
# Findings of these kinds make norms, steps and the sharpness large; a clip would leave the cause in place.
_CAUSES = ("growth", "saturated")

# The remedies are in the order in which they are recommended if several hold.
REMEDIES = {
    "clip and initialisation": Remedy(
        'nn.init.kaiming_normal_(layer.weight, nonlinearity="relu"), then max_norm of a new examination',
        "clip 1 + He init: 60 of 60 runs kept, 60 learned",
    ),
    "batch norm": Remedy("sg.nn.BatchNorm1d(units)", "70 of 70 runs kept, 60 learned"),
    "initialisation": Remedy(
        'nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")',
        "He init: 54 of 60 runs kept, 42 learned",
    ),
    "clip": Remedy(
        "sg.Stabilizer(optimizer, max_norm={max_norm:.2g})",
        "clip 1: 110 of 120 runs kept, 60 learned",
    ),
    "normalised data": Remedy(
        "(x - x.mean(0)) / x.std(0).clamp_min(1e-6)",
        "raw pixels: 25 of 30 runs lost where the baseline's are kept",
    ),
    "learning rate": Remedy("lr={rate:.2g}"),
    "warm-up": Remedy(
        "torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=steps // 10)",
        "1 of 50 runs kept, 1 learned",
    ),
    "L2": Remedy("sg.Stabilizer(optimizer, l2=1e-2)", "9 of 70 runs kept, 5 learned"),
    "accumulation": Remedy(
        "with sg.accumulate(optimizer): loss.backward()  # four times, then optimizer.step()",
        "accumulate 4: 2 of 40 runs kept, 2 learned",
    ),
    "activation": Remedy("nn.Tanh()", "tanh: 20 of 40 runs kept, 14 learned"),
    "fewer layers": Remedy(
        "half as many layers", "all plain runs kept with 5 and 10 layers, none with 20, 30 and 50"
    ),
    "Glorot": Remedy("nn.init.xavier_uniform_(layer.weight)"),
    "dead": Remedy("nn.init.zeros_(layer.bias)  # of the layer before; or nn.LeakyReLU(0.01)"),
    "spikes": Remedy(
        "sg.Stabilizer(optimizer, max_norm={max_norm:.2g}, skip=sg.SkipSpikes())",
        "clip 1 + SkipSpikes: 10 of 10 runs kept, 10 learned; SkipSpikes alone: 0 of 40",
    ),
    "loss scale": Remedy('sg.GradScaler("cuda"), or torch.bfloat16'),
    "checkpoint": Remedy('model.load_state_dict(torch.load("before.pt"))'),
    "skip": Remedy('sg.Stabilizer(optimizer, nonfinite="skip")'),
    "attention": Remedy("nn.LayerNorm(size)  # of queries and keys"),
}


def judge(found: Examination, model: nn.Module) -> list[Verdict]:
    """Returns what stands out, the surest first."""
    verdicts = _Verdicts(found)
    verdicts.judge_finiteness(model)
    verdicts.judge_layers()
    verdicts.judge_steps(any(verdict.kind in _CAUSES for verdict in verdicts.said))
    return sorted(verdicts.said, key=lambda verdict: _ORDER.index(verdict.kind))


class _Verdicts:
    def __init__(self, found: Examination) -> None:
        self.found, self.said = found, list[Verdict]()
        self.inputs = next((layer for layer in found.layers if layer.name == "input"), None)

    def say(self, kind: str, number: float, text: str, remedy: str | None = None) -> None:
        """Adds a verdict unless its number is within the threshold; ``remedy`` replaces the one of the kind."""
        if rule := THRESHOLDS.get(kind):
            if not (number < rule.value if kind in _BELOW else number > rule.value):
                return
            remedy = rule.remedy if remedy is None else remedy
        line, study = REMEDIES.get(remedy or "", Remedy(""))
        rate = self.found.largest_stable_lr / 2
        line = line.format(max_norm=self.found.max_norm, rate=rate)
        self.said.append(Verdict(kind, number, text, line, study))

    def judge_finiteness(self, model: nn.Module) -> None:
        kind = "not finite"
        for name, p in model.named_parameters():
            if count := int((~p.detach().isfinite()).sum()):
                text = (
                    f"parameter {name} is not finite, in {count:,} of {p.numel():,} elements, and "
                    "nothing that is computed from it is: load a checkpoint from before that"
                )
                self.say(kind, count, text, "checkpoint")
        for batch, numbers in self.inputs.outputs.items() if self.inputs else ():
            if not math.isfinite(numbers.norm):
                text = f"the input of batch {batch} has elements that are not finite"
                self.say(kind, batch, text, "skip")
        layers = [layer for layer in self.found.layers if layer is not self.inputs]
        batches, back = range(len(self.found.losses)), layers[::-1]
        outputs = [(b, layer) for b in batches for layer in layers if _broken(layer.outputs, b)]
        gradients = [(b, layer) for b in batches for layer in back if _broken(layer.gradients, b)]
        losses = [b for b in batches if not math.isfinite(self.found.losses[b])]
        for batch in [b for b in losses if b not in dict(outputs)][:1]:
            text = f"the loss of batch {batch} is not finite, though the network's outputs are"
            self.say(kind, batch, text, "skip")
        for what, broken in (("output", outputs), ("gradient", gradients)):
            for batch, layer in broken[:1]:
                half = layer.dtype == torch.float16
                text = (
                    f"the first {what} that is not finite is that of {layer.name or 'the model'}, "
                    f"in batch {batch}{', on the way back' if what == 'gradient' else ''}"
                    f"{': fp16 ends at 65,504' if half else ''}"
                )
                self.say(kind, batch, text, "loss scale" if half else "")

    def judge_layers(self) -> None:
        found = self.found
        dead = [u for u in found.units if u.kind == "ReLU" and u.share > THRESHOLDS["dead"].value]
        for unit in dead[:1]:
            behind = ", ".join(unit.name for unit in dead[1:5]) + ", ..." * (len(dead) > 5)
            text = (
                f"{unit.share:.0%} of the ReLU units of {unit.name or 'the model'} are dead"
                f"{f' (further on also of {behind})' if behind else ''}: 0 for every example, so that "
                "no gradient passes and what is before them does not learn; the bias or the weights "
                "before them put them far below 0"
            )
            self.say("dead", unit.share, text)
        remedy = None if any(units.kind == "ReLU" for units in found.units) else "Glorot"
        # Normalization sets the scale of what follows, whatever the weights are.
        normalized = any("Norm" in layer.kind for layer in found.layers)
        for what, factor, steps in (
            ("activations", found.factor, found.depth),
            ("gradients", found.gradient_factor, found.depth - 1),
        ):
            if factor > 0 and not normalized:
                each = factor ** (1 / steps) if steps else math.nan
                shown = f"{each:.3g} x a layer, {factor:,.4g} x over {steps}: the initialisation is"
                where = self.steepest(factor) if what == "activations" else ""
                self.say("growth", factor, f"{what} grow {shown} too large{where}", remedy)
                self.say("vanishing", factor, f"{what} vanish, {shown} too small", remedy)
        for unit in found.units:
            where = unit.name or "the model"
            if unit.kind in ("tanh", "sigmoid"):
                text = (
                    f"{unit.share:.0%} of the {unit.kind} units of {where} are saturated: they hardly "
                    "pass on a gradient, since the weights or inputs before them are too large"
                )
                self.say("saturated", unit.share, text)
            elif unit.kind == "softmax":
                text = (
                    f"the attention of {where} has {unit.share:.2g} of a uniform one's entropy: it "
                    "looks at one place alone"
                )
                self.say("entropy", unit.share, text)
        for layer in found.layers:
            if layer.dtype == torch.float16:
                text = (
                    f"fp16 loses {layer.lost:.0%} of the gradient of {layer.name}: it is below 6e-8"
                )
                self.say("underflow", layer.lost, text)
        if self.inputs is not None:
            rms = self.inputs.rms
            text = f"the inputs have a root mean square of {rms:.3g}: they are not normalised"
            self.say("inputs", rms, text)

    def steepest(self, factor: float) -> str:
        """Names the layer that multiplies by more than all the others together, if there is one."""
        layers = [layer for layer in self.found.layers if layer.has_weight and layer.gain > 0]
        steepest = max(layers, key=lambda layer: layer.gain, default=None)
        if steepest is None or len(layers) < 3 or steepest.gain < max(10.0, factor**0.5):
            return ""
        where = f"layer {steepest.name!r} ({steepest.kind})"
        return f", above all in {where}, which alone multiplies by {steepest.gain:,.3g}"

    def judge_steps(self, caused: bool) -> None:
        found = self.found
        ratio = found.lr / found.largest_stable_lr if found.largest_stable_lr > 0 else math.nan
        # If the cause has been named already, its consequences get no remedy of their own.
        follows, remedy = (", which follows from the above", "") if caused else ("", None)
        then = ""
        for tried in found.trials[:1]:
            text = f"the first step is {tried.first_step:,.3g} x as long as the parameters{follows}"
            self.say("first step", tried.first_step, text, remedy)
            if tried.holds:
                then = "; tried on a copy, it holds all the same"
                continue
            text = (
                f"the run will be lost: tried on a copy, the loss went from {tried.start:.3g} to "
                f"{tried.end:.3g} in {len(tried.losses)} steps"
            )
            if ratio > 1 and not caused:
                text += f", at {ratio:,.3g} x the largest stable learning rate"
            elif len(tried.losses) == STEPS and not caused:
                text += ", at a rate that its curvature does not allow"
            # A clip only hides a cause that a better initialisation removes, so it does not come first.
            order = [*REMEDIES] if caused else ["clip", *REMEDIES]
            holding = [trial.remedy for trial in found.trials if trial.holds]
            best = next((name for name in order if name in holding), "")
            self.say("lost", tried.end, text, best)
        stable = f"the largest stable one, {found.largest_stable_lr:.2g}{follows}{then}"
        text = f"the learning rate, {found.lr:.2g}, is {ratio:,.3g} x {stable}"
        self.say("rate", ratio, text, remedy)
        norms = [norm for norm in found.norms if math.isfinite(norm)] or [0.0]
        spike = max(norms) / (statistics.median(norms) or math.inf)
        text = (
            f"the largest gradient norm is {spike:,.3g} x the median: a batch is a spike{follows}"
        )
        self.say("spike", spike, text, remedy)


def _broken(numbers: Mapping[int, Numbers], batch: int) -> bool:
    return batch in numbers and not math.isfinite(numbers[batch].norm)
