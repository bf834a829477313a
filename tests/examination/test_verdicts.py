"""Tests that planted faults are named, and healthy networks get no verdict."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steadygrad as sg
from steadygrad.examination import REMEDIES, THRESHOLDS, Examination, Verdict
from tests.examination.networks import Batch, batches, cross_entropy, mlp

pytestmark = pytest.mark.usefixtures("one_thread")
DOCS = Path(__file__).resolve().parents[2] / "docs"


def the(found: Examination, kind: str) -> Verdict:
    return next(verdict for verdict in found.verdicts if verdict.kind == kind)


def kinds(found: Examination) -> set[str]:
    return {verdict.kind for verdict in found.verdicts}


@pytest.mark.parametrize("layers", [3, 6, 12])
def test_nothing_stands_out_in_a_healthy_network(layers: int) -> None:
    model = mlp(layers, width=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found = sg.examine(model, cross_entropy, batches(), optimizer=optimizer)
    assert found.verdicts == [] and found.trials == []
    assert "nothing stands out" in str(found)


def test_an_initialisation_that_is_too_large() -> None:
    model = mlp(20, gain=1.5)
    found = sg.examine(model, cross_entropy, batches())
    verdict = the(found, "growth")
    assert verdict.number == found.factor > 500
    assert re.match(r"activations grow 1\.[3-7]\d? x a layer, [\d,]+ x over 20: ", verdict.text)
    assert "kaiming_normal_" in verdict.line and "54 of 60" in verdict.study
    assert [v.text.split()[0] for v in found.verdicts] == ["activations", "gradients"]


def test_small_embeddings_before_a_norm_are_no_fault_of_the_initialisation() -> None:
    model = nn.Sequential(nn.Embedding(11, 20), nn.LayerNorm(20), nn.Linear(20, 5))
    nn.init.normal_(model[0].weight, std=1e-3)
    found = sg.examine(model, cross_entropy, [(torch.randint(11, (16,)), y) for _, y in batches()])
    assert found.factor > 100 and found.gradient_factor > 100
    assert found.verdicts == []


def test_an_initialisation_that_is_too_small() -> None:
    found = sg.examine(mlp(20, gain=0.5), cross_entropy, batches())
    assert {"vanishing"} <= kinds(found) <= {"vanishing", "dead"}


def test_a_rate_that_is_too_large_and_what_holds() -> None:
    model = mlp(6)
    stable = sg.examine(model, cross_entropy, batches()).largest_stable_lr
    optimizer = torch.optim.SGD(model.parameters(), lr=1000 * stable)
    found = sg.examine(model, cross_entropy, batches(), optimizer=optimizer)
    assert found.verdicts[0].kind == "lost"
    assert the(found, "rate").number == pytest.approx(1000, rel=0.1)
    trials = {trial.remedy: trial for trial in found.trials}
    assert not trials["as it is"].holds
    assert trials["clip"].holds and trials["learning rate"].holds
    assert trials["clip"].first_step == pytest.approx(0.01, rel=0.1)
    assert found.verdicts[0].line == f"sg.Stabilizer(optimizer, max_norm={found.max_norm:.2g})"
    assert str(found).count(" lost  ") == sum(not trial.holds for trial in found.trials)


def test_an_infinite_weight() -> None:
    model = mlp(4)
    with torch.no_grad():
        model[2].weight[1, 1] = torch.inf
    found = sg.examine(model, cross_entropy, batches())
    text = "parameter 2.weight is not finite, in 1 of 400 elements, and nothing that is"
    assert found.verdicts[0].text.startswith(text)
    assert "first output that is not finite is that of 2, in batch 0" in str(found)
    assert found.why_no_sharpness == "no batch has a finite loss and gradient"


@pytest.mark.parametrize("at", [None, "first_nonfinite"])
def test_an_infinite_input_in_one_batch(at: Any) -> None:
    given = batches(4)
    given[2][0][3, 3] = torch.inf
    found = sg.examine(mlp(4), cross_entropy, given, at=at)
    batch = 2 if at is None else 0
    assert found.verdicts[0].text == f"the input of batch {batch} has elements that are not finite"
    assert len(found.losses) == (4 if at is None else 1)
    assert (found.sharpness == found.sharpness) is (at is None)


def test_a_loss_that_is_not_finite() -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.sum() * 0).log()

    found = sg.examine(mlp(4), loss_fn, batches(1))
    assert "the loss of batch 0 is not finite, though the network's outputs are" in str(found)


def test_a_gradient_that_is_not_finite() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 0).abs().sqrt()  # the gradient is infinity times 0

    model = nn.Sequential(nn.Linear(20, 8), Root(), nn.Linear(8, 5))
    found = sg.examine(model, cross_entropy, batches(1))
    assert "the first gradient that is not finite is that of 0, in batch 0" in str(found)


def test_a_dead_layer() -> None:
    model = mlp(4)
    with torch.no_grad():
        model[2].bias.fill_(-100.0)
    verdict = the(sg.examine(model, cross_entropy, batches()), "dead")
    assert verdict.text.startswith("100% of the ReLU units of 3 are dead (further on also of 5): ")
    assert verdict.number == 1


class TanhRNN(nn.Module):
    def __init__(self, scale: float, nonlinearity: str = "tanh") -> None:
        super().__init__()
        self.rnn = nn.RNN(4, 16, batch_first=True, nonlinearity=nonlinearity)
        self.last = nn.Linear(16, 5)
        with torch.no_grad():
            for p in self.rnn.parameters():
                p.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.rnn(x.view(-1, 5, 4))[0][:, -1])
        return out


def test_a_saturated_recurrent_network() -> None:
    verdict = the(sg.examine(TanhRNN(100.0), cross_entropy, batches()), "saturated")
    assert re.match(r"\d\d% of the tanh units of rnn are saturated", verdict.text)
    assert sg.examine(TanhRNN(1.0), cross_entropy, batches()).verdicts == []


class HalfPrecision(nn.Module):
    """Computes in fp16 between a first and a last layer in fp32; all in fp32 once converted."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 5)
        self.middle.half()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        x = (self.first(x) * self.factor).to(self.middle.weight.dtype)
        out: Tensor = self.last(self.middle(x).float())
        return out


@pytest.mark.parametrize("scale", [1.0, 2.0**14])
def test_gradients_that_fp16_loses(scale: float) -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets) * 1e-6

    found = sg.examine(HalfPrecision(1.0), loss_fn, batches(2), loss_scale=scale)
    if scale > 1:
        assert "underflow" not in kinds(found)
        return
    verdict = the(found, "underflow")
    assert verdict.number > 0.9 and "of the gradient of middle: it is below 6e-8" in verdict.text
    assert "GradScaler" in verdict.line


def test_activations_beyond_fp16() -> None:
    found = sg.examine(HalfPrecision(1e5), cross_entropy, batches(1))
    text = "the first output that is not finite is that of middle, in batch 0: fp16 ends at 65,504"
    assert text in str(found)


def test_inputs_that_are_not_normalised() -> None:
    given: list[Batch] = [(100 + 50 * x, y) for x, y in batches()]
    model = mlp(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    found = sg.examine(model, cross_entropy, given, optimizer=optimizer)
    assert "not normalised" in the(found, "inputs").text
    assert next(trial for trial in found.trials if trial.remedy == "normalised data").holds


def test_a_batch_that_is_a_spike() -> None:
    given = batches(8)
    given[5][0].mul_(1000)
    found = sg.examine(mlp(4), cross_entropy, given)
    assert the(found, "spike").number > 10 and "SkipSpikes" in the(found, "spike").line


def test_attention_that_has_collapsed() -> None:
    class Attention(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.query, self.last, self.scale = nn.Linear(4, 4), nn.Linear(4, 5), scale

        def forward(self, x: Tensor) -> Tensor:
            x = x.view(-1, 5, 4)
            weights = (self.query(x) @ x.mT * self.scale).softmax(-1)
            out: Tensor = self.last((weights @ x)[:, 0])
            return out

    found = sg.examine(Attention(1e4), cross_entropy, batches())
    assert "entropy" in kinds(found)
    assert "entropy" not in kinds(sg.examine(Attention(1.0), cross_entropy, batches()))


def test_every_threshold_has_a_source_and_every_verdict_a_threshold() -> None:
    assert all(re.search(r"\d{4}|study|report", t.source) for t in THRESHOLDS.values())
    text = (Path(sg.__file__).parent / "examination" / "verdicts.py").read_text()
    named = set(re.findall(r"say\(\"([a-z ]+)\"", text)) - {"lost"}
    assert named == set(THRESHOLDS)


def test_a_parameter_that_the_loss_does_not_use_is_no_reason_to_try_remedies() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = mlp(3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    model = Spare()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found = sg.examine(model, cross_entropy, batches(), optimizer=optimizer)
    assert found.verdicts == [] and found.trials == []
    assert "unused     spare.weight, spare.bias" in str(found)


def test_what_the_verdicts_say_of_the_study_is_what_it_says() -> None:
    page = (DOCS / "study.md").read_text()
    for name, (_, study) in REMEDIES.items():
        arm = {"warm-up": "warmup"}.get(name, name)
        for kept, of, learned in re.findall(r"(\d+) of (\d+) runs kept, (\d+) learned", study):
            arm = study.partition(":")[0] if ":" in study else arm
            assert re.search(
                rf"\| {re.escape(arm)}[^|]*\|.*\| {kept}/{of} \([^|]*\), learned {learned} \|",
                page,
            ), name


@pytest.mark.parametrize("wrap", [True, False])
def test_a_stabilized_optimizer_is_tried_with_its_limit_and_records_nothing(wrap: bool) -> None:
    model, written = mlp(20, gain=1.5), []
    telemetry = sg.Telemetry(writers=[written.append], every=1)
    options: dict[str, Any] = {"max_norm": 1e-3, "telemetry": telemetry}
    if wrap:
        opt: Any = sg.Stabilizer(torch.optim.SGD(model.parameters(), lr=0.1), **options)
    else:
        opt = sg.optim.SGD(model.parameters(), lr=0.1, **options)
    before = repr(opt.state_dict())
    found = sg.examine(model, cross_entropy, batches(), optimizer=opt)
    assert found.trials[0].remedy == "as it is" and found.trials[0].holds
    assert found.trials[0].losses[-1] == pytest.approx(found.trials[0].losses[4], rel=0.5)
    assert written == [] and repr(opt.state_dict()) == before
    assert opt.report().steps == 0


@pytest.mark.parametrize(
    ("kind", "why"),
    [(torch.optim.LBFGS, "closure"), (sg.optim.Lion, "Lion is not one of torch's optimizers")],
)
def test_remedies_that_cannot_be_tried(kind: Any, why: str) -> None:
    model = mlp(20, gain=1.5)
    found = sg.examine(model, cross_entropy, batches(), optimizer=kind(model.parameters()))
    assert found.trials == [] and why in found.why_no_trials
    assert f"remedies could not be tried: {found.why_no_trials}" in str(found)


class Softened(nn.Module):
    """Computes ``log cosh p``, whose gradient is bounded: above the stable rate a run swings for ever."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([start]))

    def forward(self, x: Tensor) -> Tensor:
        return self.p.cosh().log().sum()


# At lr = 3 the run swings between -a and a with 2 a = 3 tanh a, where 3 is 0.39 of the stable rate.
@pytest.mark.parametrize(("lr", "holds"), [(3.0, False), (2.5, True)])
def test_a_run_at_the_edge_whose_loss_does_not_fall_is_lost(lr: float, holds: bool) -> None:
    model = Softened(1.2878)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    found = sg.examine(model, lambda model, batch: model(batch), [0], optimizer=optimizer)
    assert found.lr < found.largest_stable_lr
    assert found.trials[0].holds is holds
    assert ("lost" in kinds(found)) is not holds
    assert holds or "at a rate that its curvature does not allow" in found.verdicts[0].text


def test_a_batch_that_is_harder_than_the_first_one_is_no_rise_of_the_loss() -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    given = [(x, scale * torch.ones(2, 1)) for scale in (0.1, 1.0, 1.0, 1.0)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.9)  # 0.45 of the largest stable rate
    found = sg.examine(model, nn.functional.mse_loss, given, optimizer=optimizer)
    (trial,) = found.trials
    assert trial.losses[1] > 5 * trial.losses[0] and trial.holds
    assert trial.start == pytest.approx(statistics.fmean(found.losses))
    assert found.verdicts == []


def test_far_below_the_stable_rate_nothing_is_tried() -> None:
    model = Softened(1.2878)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    found = sg.examine(model, lambda model, batch: model(batch), [0], optimizer=optimizer)
    assert found.trials == [] and found.verdicts == []


def test_which_remedies_are_tried() -> None:
    model = mlp(20, gain=1.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = sg.examine(model, cross_entropy, batches(), optimizer=optimizer)
    names = (
        "as it is, clip, learning rate, warm-up, L2, accumulation, initialisation, "
        "clip and initialisation, batch norm, fewer layers, activation"
    )
    assert [trial.remedy for trial in found.trials] == names.split(", ")
    assert set(names.split(", ")[1:]) < set(REMEDIES)


def first_loss(model: nn.Module, remedy: str, given: list[Batch]) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    found = sg.examine(model, cross_entropy, given, optimizer=optimizer)
    return {trial.remedy: trial for trial in found.trials}[remedy].losses[0]


def test_what_the_remedies_that_change_a_network_do_to_it() -> None:
    model, given = mlp(6), batches()
    shorter = nn.Sequential(*(model[place] for place in (0, 1, 4, 5, 8, 9, 10)))
    expected = cross_entropy(shorter(given[0][0]), given[0][1]).item()
    assert first_loss(model, "fewer layers", given) == pytest.approx(expected)
    bounded = nn.Sequential(*(nn.Tanh() if type(m) is nn.ReLU else m for m in model))
    expected = cross_entropy(bounded(given[0][0]), given[0][1]).item()
    assert first_loss(model, "activation", given) == pytest.approx(expected)
    expected = sum(cross_entropy(model(x), y).item() for x, y in given) / 4
    assert first_loss(model, "accumulation", given) == pytest.approx(expected)


def test_blocks_that_take_a_mask_are_left_out_and_those_that_return_tuples_are_passed_by() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    blocks = nn.Sequential(nn.Unflatten(1, (5, 4)), nn.TransformerEncoder(layer, 4))
    model = nn.Sequential(blocks, nn.Flatten(), nn.Linear(20, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e4)
    found = sg.examine(model, cross_entropy, batches(), optimizer=optimizer)
    assert "fewer layers" in {trial.remedy for trial in found.trials}

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.RNN(4, 4, batch_first=True) for _ in range(3))
            self.last = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = x.view(-1, 5, 4)
            for layer in self.layers:
                x, _ = layer(x)
            out: Tensor = self.last(x[:, -1])
            return out

    model = Recurrent()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e4)
    found = sg.examine(model, cross_entropy, batches(), optimizer=optimizer)
    tried = {trial.remedy for trial in found.trials}
    assert "clip" in tried and "fewer layers" not in tried


def test_one_layer_that_is_too_large_is_named() -> None:
    torch.manual_seed(0)
    model = mlp(9)
    with torch.no_grad():
        model[4].weight.mul_(300)
    verdict = the(sg.examine(model, cross_entropy, batches()), "growth")
    assert ", above all in layer '4' (Linear), which alone multiplies by " in verdict.text
