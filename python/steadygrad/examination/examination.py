"""Holds what an examination found, and shows it as a page of text or a picture."""

from __future__ import annotations

import math
import os
import statistics
from dataclasses import dataclass, field

from steadygrad.examination.recording import Layer, Units

_SHOWN = 8


@dataclass(frozen=True)
class ParameterGradient:
    """Describes the gradient of a parameter.

    Attributes:
        name: Name of the parameter, as in ``model.named_parameters()``.
        norm: Mean of its norm over the batches; NaN if the parameter is frozen or unused.
        share: ``norm`` divided by the mean norm of all gradients together.
        ratio: ``norm`` divided by the norm of the parameter.
        spread: Standard deviation of the norm over the batches, divided by ``norm``.
        state: ``"frozen"``, ``"unused"`` or ``""``.
    """

    name: str
    norm: float
    share: float
    ratio: float
    spread: float
    state: str


@dataclass(frozen=True)
class Verdict:
    """Describes a finding that stands out.

    Attributes:
        kind: A key of the table of thresholds, ``"not finite"`` or ``"lost"``.
        number: The number that stands out.
        text: The number and the reason, in a sentence.
        line: The line of code that helps against the finding; ``""`` if there is none.
        study: What the study measured for the remedy in ``line``.
    """

    kind: str
    number: float
    text: str
    line: str = ""
    study: str = ""


@dataclass
class Trial:
    """Records how a remedy did on a copy of the network.

    Attributes:
        remedy: Name of the remedy; ``"as it is"`` for none.
        holds: Whether the run is expected to survive.
        ratios: Learning rate after the clip, divided by the largest stable one. The first is taken at the start; others
            after 16, 32 and 64 steps of the network as it is, and at the end of a warm-up. NaN if unknown.
        first_step: Length of the first step, divided by the norm of the parameters.
        losses: Loss of each step; at most 128 steps of the network as it is, and 16 of a remedy.
        start: Mean loss over the batches before the first step.
        end: Last loss if it rose out of bounds, else the mean of the last quarter of the losses.
    """

    remedy: str
    holds: bool
    ratios: tuple[float, ...]
    first_step: float
    losses: tuple[float, ...]
    start: float
    end: float

    def __str__(self) -> str:
        """Returns a row of the table of remedies."""
        way = f"{self.start:.3g} -> {self.end:.3g} in {len(self.losses)} steps"
        verdict = ("holds" if self.end < 0.99 * self.start else "flat") if self.holds else "lost"
        return f"{self.remedy:<24} {verdict:<6} {way:<34} {self.first_step:>10.2g} {self.ratios[0]:>10.2g}"


@dataclass
class Examination:
    """Holds what :func:`steadygrad.examine` found; ``print(found)`` prints it as a page.

    Attributes:
        layers: Calls of layers in the order of execution, the model's input first.
        parameters: Gradients of the parameters, in the model's order.
        units: What each activation function did.
        losses: Loss of each batch.
        norms: Norm of all gradients together, for each batch.
        depth: Number of calls of layers with weights.
        factor: Root mean square of the last such layer's output, divided by that of the input; or by that of the first
            such layer's output.
        gradient_factor: Norm of the loss's gradient at the first such layer's output, divided by that at the last
            one's.
        sharpness: Largest eigenvalue of the Hessian, preconditioned for adaptive optimizers; NaN if it was left out.
        why_no_sharpness: Reason why the sharpness was left out.
        lr: Learning rate of the optimizer's first param group; NaN without an optimizer.
        largest_stable_lr: Largest stable learning rate; infinite unless the sharpness is above 0, NaN if it is unknown.
        max_norm: Recommended limit to begin with.
        trials: Remedies that were tried on a copy.
        why_no_trials: Error that kept remedies from being tried.
        verdicts: Findings that stand out, the surest first.
    """

    layers: list[Layer]
    parameters: list[ParameterGradient]
    units: list[Units]
    losses: list[float]
    norms: list[float]
    depth: int = 0
    factor: float = math.nan
    gradient_factor: float = math.nan
    sharpness: float = math.nan
    why_no_sharpness: str = ""
    lr: float = math.nan
    largest_stable_lr: float = math.nan
    max_norm: float = math.nan
    trials: list[Trial] = field(default_factory=list)
    why_no_trials: str = ""
    verdicts: list[Verdict] = field(default_factory=list)

    def __str__(self) -> str:
        """Returns a page that says what stands out and which remedies hold, with the numbers."""
        norms = sorted(self.norms)
        lines = [f"{len(norms)} batches: " + _range("loss", self.losses)]
        lines.append("\nwhat stands out, the surest first" if self.verdicts else "")
        lines += [] if self.verdicts else ["nothing stands out"]
        for number, verdict in enumerate(self.verdicts, 1):
            lines.append(f"{number}. {verdict.text}")
            lines += [f"   write: {verdict.line}"] if verdict.line else []
            lines += [f"   our study: {verdict.study}"] if verdict.study else []
        if self.trials:
            lines.append(
                "\ntried on copies; lost: expected to diverge, flat: not, but the loss did not fall in the trial, "
                "holds: it fell"
            )
            lines += [f"{'':<71}first step         lr", f"{'':<68}/ parameters   / stable"]
            lines += [f"  {trial}" for trial in self.trials]
        if self.why_no_trials:
            lines.append(f"\nremedies could not be tried: {self.why_no_trials}")
        lines += ["\nnumbers", f"gradients  {_range('norm', norms)}"]
        clip_is_lost = any(trial.remedy == "clip" and not trial.holds for trial in self.trials)
        if math.isfinite(self.max_norm) and not clip_is_lost:
            lines[-1] += f"; a limit to begin with: max_norm={self.max_norm:.2g}"
        if math.isfinite(self.factor):
            lines.append(
                f"depth      {self.depth} layers multiply activations by {self.factor:,.4g}, and "
                f"gradients by {self.gradient_factor:,.4g} on their way back (near 1 is healthy)"
            )
        if self.why_no_sharpness:
            lines.append(f"sharpness  left out: {self.why_no_sharpness}")
        else:
            yours = "" if math.isnan(self.lr) else f", yours is {self.lr:.2g}"
            stable = f"a learning rate is stable up to {self.largest_stable_lr:.2g}{yours}"
            if math.isnan(self.largest_stable_lr):
                stable = "which learning rate is stable is not known of this optimizer"
            lines.append(f"sharpness  {self.sharpness:.3g}: {stable}")
        for state in ("frozen", "unused"):
            names = [p.name for p in self.parameters if p.state == state]
            if names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                lines.append(f"{state:<10} {', '.join(names[:_SHOWN])}{more}")
        largest = sorted((p for p in self.parameters if p.norm > 0), key=lambda p: -p.norm)[:_SHOWN]
        if largest:
            lines.append(f"{'largest gradients, norm':<34}  / total  / parameter   spread")
        for p in largest:
            ratio = "-" if math.isnan(p.ratio) else f"{p.ratio:.2g}"
            lines.append(f"  {p.name:<32} {p.share:8.2g} {ratio:>12} {p.spread:8.2g}")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws activations and gradients of the layers with weights, by depth.

        Args:
            path: Path of the file; its suffix gives the format, as in ``matplotlib``.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "plot: matplotlib is not installed: pip install 'steadygrad[plot]'"
            ) from error
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        axis = figure.subplots()
        shown = [layer for layer in self.layers if layer.has_weight] or self.layers
        for label, color, values in (
            ("activations, root mean square", "#0072b2", [layer.rms for layer in shown]),
            ("gradient, norm", "#d55e00", [layer.gradient_norm for layer in shown]),
        ):
            drawn = [value if 0 < value < math.inf else math.nan for value in values]
            axis.semilogy(drawn, "o-", color=color, markersize=3.5, label=label)
        title = self.verdicts[0].text if self.verdicts else "nothing stands out"
        axis.set_title(title, loc="left", fontsize=10, wrap=True)
        every = 1 + len(shown) // 40
        names = [layer.name[-28:].replace("$", r"\$") or layer.kind for layer in shown[::every]]
        axis.set_xticks(range(0, len(shown), every), names, rotation=90, fontsize=7)
        axis.set_xlabel("layers with weights, in the order of execution")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8.5)
        figure.savefig(os.fspath(path), dpi=150)


def _range(what: str, values: list[float]) -> str:
    finite = sorted(filter(math.isfinite, values))
    text = "not finite in any batch"
    if finite:
        middle = statistics.median(finite)
        text = f"{finite[0]:.3g} to {finite[-1]:.3g}, median {middle:.3g}"
    if 0 < len(finite) < len(values):
        text += f", not finite in {len(values) - len(finite)}"
    return f"{what} {text}"
