"""Lists the thresholds above which a number stands out, with sources, and what the study measured by remedy."""

from __future__ import annotations

from typing import NamedTuple


class Threshold(NamedTuple):
    """Holds a number above which something stands out, its source, and a remedy, which is a key of :data:`REMEDIES`."""

    value: float
    source: str
    remedy: str = ""


class Remedy(NamedTuple):
    """Holds the line of code for a remedy, as in ``docs/remedies.md``, and what ``docs/study.md`` says about it."""

    line: str
    study: str = ""


THRESHOLDS = {
    "rate": Threshold(
        1.0, "lr by the largest stable one; Cohen et al. 2021, Gilmer et al. 2022", "learning rate"
    ),
    # The growth is 4 to 21 in the study's MLPs of 5 and 10 layers, which all survive, and 76 or more in deeper ones.
    "growth": Threshold(30.0, "over all layers; the study, docs/examine.md", "initialisation"),
    "vanishing": Threshold(1e-4, "over all layers; Glorot and Bengio 2010", "initialisation"),
    "first step": Threshold(1.0, "by the parameters' norm; You et al. 2017", "clip"),
    # At the start of every network of the study, up to 50 layers deep, at most 0.5 are dead and 0.01 saturated.
    "dead": Threshold(0.9, "share of ReLUs; the study, docs/examine.md", "dead"),
    "saturated": Threshold(0.5, "share beyond 0.99; Glorot and Bengio 2010", "Glorot"),
    "entropy": Threshold(0.05, "share of a uniform one's; Zhai et al. 2023", "attention"),
    "underflow": Threshold(0.05, "share lost; Micikevicius et al. 2018", "loss scale"),
    "spike": Threshold(10.0, "largest norm by the median; opt.report()", "spikes"),
    "inputs": Threshold(10.0, "root mean square; LeCun et al. 1998", "normalised data"),
}

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
