"""The thresholds of the verdicts, each with its source, and what the study measured for each remedy."""

from __future__ import annotations

from typing import NamedTuple


class Threshold(NamedTuple):
    """A number from which on something stands out, and where it comes from."""

    value: float
    source: str


class Remedy(NamedTuple):
    """The line to write for a remedy, as in ``docs/remedies.md``, and what ``docs/study.md`` says of it."""

    line: str
    study: str


THRESHOLDS = {
    "rate": Threshold(1.0, "of the largest stable rate; Cohen et al. 2021, Gilmer et al. 2022"),
    # 4 to 21 in the study's MLPs of 5 and 10 layers, which all survive, from 76 on in deeper ones.
    "growth": Threshold(30.0, "factor over all layers; the study, docs/examine.md"),
    "vanishing": Threshold(1e-4, "factor over all layers; Glorot and Bengio 2010, section 4.2"),
    "first step": Threshold(1.0, "by the parameters' norm; You et al. 2017, section 3"),
    # At most 0.5 at the start of any network of the study, 50 layers deep; 0.01 saturated.
    "dead": Threshold(0.9, "share of a layer's ReLUs; the study, docs/examine.md"),
    "saturated": Threshold(0.5, "share of |tanh| > 0.99; Glorot and Bengio 2010, section 3"),
    "entropy": Threshold(0.05, "share of a uniform softmax's; Zhai et al. 2023, figure 1"),
    "underflow": Threshold(0.05, "share of a gradient; Micikevicius et al. 2018, section 3.2"),
    "spike": Threshold(10.0, "largest norm by the median, as in opt.report()"),
    "inputs": Threshold(10.0, "root mean square; LeCun et al. 1998, section 4.3"),
}

# In the order in which they are recommended where several hold.
REMEDIES = {
    "clip and initialisation": Remedy(
        'nn.init.kaiming_normal_(layer.weight, nonlinearity="relu") and max_norm={max_norm:.2g}',
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
    "learning rate": Remedy("lr={rate:.2g}", ""),
    "warm-up": Remedy(
        "torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=steps // 10)",
        "1 of 50 runs kept, 1 learned",
    ),
    "L2": Remedy("sg.Stabilizer(optimizer, l2=1e-2)", "9 of 70 runs kept, 5 learned"),
    "Glorot's initialisation": Remedy("nn.init.xavier_uniform_(layer.weight)", ""),
    "saturated": Remedy("nn.init.xavier_uniform_(layer.weight)", ""),
    "leaky": Remedy("nn.LeakyReLU(0.01)", "against explosions it kept 0 of 40 runs"),
    "spikes": Remedy(
        "sg.Stabilizer(optimizer, max_norm={max_norm:.2g}, skip=sg.SkipSpikes())",
        "clip 1 + SkipSpikes: 10 of 10 runs kept, 10 learned; SkipSpikes alone: 0 of 40",
    ),
    "loss scale": Remedy('sg.GradScaler("cuda"), or torch.bfloat16', ""),
    "skip": Remedy('sg.Stabilizer(optimizer, nonfinite="skip")', ""),
    "attention": Remedy("nn.LayerNorm(size)  # of queries and keys", ""),
}
