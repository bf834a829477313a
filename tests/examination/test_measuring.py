"""Tests what an examination measures by layer and by parameter, in every kind of network."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import steadygrad as sg
from tests.examination.networks import Everything, batches, cross_entropy, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def test_layers_against_activations_and_gradients_taken_by_hand() -> None:
    model, given = mlp(3, gain=1.5), batches(3)
    found = sg.examine(model, cross_entropy, given)
    names = ["input", "0", "1", "2", "3", "4"]
    assert [layer.name for layer in found.layers] == names
    assert [layer.has_weight for layer in found.layers] == [False, True, False, True, False, True]
    for batch, (x, y) in enumerate(given):
        values = [x]
        for module in model:
            values.append(module(values[-1]))
        gradients = torch.autograd.grad(cross_entropy(values[-1], y), values[1:])
        for layer, value, gradient in zip(found.layers, values, [None, *gradients], strict=True):
            numbers = layer.outputs[batch]
            assert numbers.rms == pytest.approx(value.square().mean().sqrt().item(), rel=1e-5)
            assert numbers.std == pytest.approx(value.std(correction=0).item(), rel=1e-5)
            assert numbers.largest == value.abs().max().item()
            if gradient is not None:
                assert layer.gradients[batch].norm == pytest.approx(
                    gradient.norm().item(), rel=1e-5
                )
    first, second = found.layers[1:3]
    assert second.gain == pytest.approx(second.rms / first.rms)
    assert first.gradient_gain == pytest.approx(first.gradient_norm / second.gradient_norm)
    assert found.factor == pytest.approx(math.prod(layer.gain for layer in found.layers[1:]))
    assert found.depth == 3


def test_parameters() -> None:
    model, given = Everything(), batches(3)
    model.drop.p = 0.0
    model.last.bias.requires_grad_(False)
    found = sg.examine(model, cross_entropy, given, sharpness=False)
    rows = {row.name: row for row in found.parameters}
    assert list(rows) == [name for name, _ in model.named_parameters()]
    assert [n for n, row in rows.items() if row.state == "unused"] == [
        "unused.weight",
        "unused.bias",
    ]
    assert [n for n, row in rows.items() if row.state == "frozen"] == ["last.bias"]
    assert "frozen     last.bias" in str(found) and "unused     unused.weight" in str(found)
    norms = []
    for x, y in given:
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        norms.append(model.last.weight.grad.norm().item())
    row = rows["last.weight"]
    assert row.norm == pytest.approx(statistics.fmean(norms), rel=1e-4)
    assert row.spread == pytest.approx(statistics.pstdev(norms) / row.norm, rel=1e-2)
    assert row.ratio == pytest.approx(row.norm / model.last.weight.norm().item(), rel=1e-4)
    assert sum(r.share**2 for r in rows.values() if not r.state) == pytest.approx(1, rel=0.1)


def test_a_gradient_that_is_infinite_in_every_batch() -> None:
    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return torch.full_like(gradient, torch.inf)

    given = [(x.abs() + 1, y) for x, y in batches(2)]
    found = sg.examine(nn.Linear(20, 5), lambda x, y: cross_entropy(Infinite.apply(x), y), given)
    assert [row.norm for row in found.parameters] == [math.inf, math.inf]
    assert all(math.isnan(row.spread) for row in found.parameters)


def test_shared_and_recurrent_layers_count_once_a_call() -> None:
    found = sg.examine(Everything(), cross_entropy, batches(2))
    calls = [(layer.name, layer.call) for layer in found.layers]
    assert calls == [
        ("input", 0), ("conv", 0), ("norm", 0), ("drop", 0), ("shared", 0), ("shared", 1),
        ("recurrent", 0), ("attention", 0), ("last", 0),
    ]  # fmt: skip
    assert {(units.name, units.kind) for units in found.units} >= {("", "ReLU")}


def test_dead_units_are_counted_by_channel_and_by_feature() -> None:
    conv = nn.Conv2d(1, 4, 3)
    linear = nn.Linear(36, 5)
    with torch.no_grad():
        conv.bias[:3] = -100.0
    model = nn.Sequential(
        nn.Unflatten(1, (1, 5, 4)), conv, nn.ReLU(), nn.Flatten(), nn.LazyLinear(6)
    )
    model.append(nn.ReLU()).append(nn.Linear(6, 5))
    model(batches(1)[0][0])
    with torch.no_grad():
        model[4].bias[:1] = -100.0
    del linear
    found = sg.examine(model, cross_entropy, batches())
    shares = {units.name: float(units.share) for units in found.units}
    assert shares["2"] == pytest.approx(0.75) and 1 / 6 - 1e-6 <= shares["5"] < 0.9


def test_tied_weights_and_integers_as_inputs() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.block = nn.Embedding(11, 8), nn.TransformerEncoderLayer(8, 2, 16)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            out: Tensor = self.head(self.block(self.embedding(tokens)))
            return out

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        tokens = batch["tokens"]
        return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    given = [{"tokens": torch.randint(11, (4, 7))} for _ in range(3)]
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = sg.examine(model, loss_fn, given, optimizer=optimizer)
    assert [row.name for row in found.parameters].count("embedding.weight") == 1
    assert found.layers[0].name == "embedding" and found.layers[-1].name == "head"
    assert 0 < found.largest_stable_lr < math.inf


def test_at_most_sixteen_batches_are_taken() -> None:
    given = iter(batches(20))
    assert len(sg.examine(mlp(), cross_entropy, given).losses) == 16
    assert len(list(given)) == 4


def test_under_autocast_and_a_loss_scale() -> None:
    model, given = mlp(), batches()
    whole = sg.examine(model, cross_entropy, given)
    with torch.autocast("cpu", torch.bfloat16):
        found = sg.examine(model, cross_entropy, given, loss_scale=1024.0)
    assert found.layers[1].dtype == torch.bfloat16
    assert found.norms == pytest.approx(whole.norms, rel=0.1)
    assert found.sharpness == pytest.approx(whole.sharpness, rel=0.2)


def test_activations_whose_squares_are_beyond_fp32() -> None:
    model = nn.Sequential(nn.Linear(20, 8), nn.Linear(8, 5))
    given = [(x * 1e25, y) for x, y in batches(1)]
    layer = sg.examine(model, cross_entropy, given, sharpness=False).layers[0]
    assert layer.rms == pytest.approx(1e25 * given[0][0].div(1e25).square().mean().sqrt().item())


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_wrapped_model_is_looked_through(one_rank: None) -> None:
    model, given = mlp(), batches()
    plain = sg.examine(model, cross_entropy, given)
    wrapped: Any = nn.parallel.DistributedDataParallel(model)
    found = sg.examine(wrapped, cross_entropy, given)
    assert found.norms == plain.norms
    assert [row.name for row in found.parameters] == [row.name for row in plain.parameters]
    cross_entropy(wrapped(given[0][0]), given[0][1]).backward()  # DDP's reducer must still work


@pytest.mark.compile
@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_runs_eagerly(in_place: bool) -> None:
    model, given = mlp(), batches()
    plain = sg.examine(model, cross_entropy, given)
    compiled: Any = model
    if in_place:
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    compiled(given[0][0])
    found = sg.examine(compiled, cross_entropy, given)
    assert [layer.name for layer in found.layers] == [layer.name for layer in plain.layers]
    assert found.norms == plain.norms


def test_converted_batch_norms_are_seen() -> None:
    model = nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    sg.nn.convert_batchnorm(model)
    found = sg.examine(model, cross_entropy, batches())
    assert any(units.kind == "ReLU" for units in found.units)
    assert found.sharpness > 0


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = sg.examine(mlp(20, gain=1.5), cross_entropy, batches())
    found.plot(tmp_path / "gains.png")
    assert (tmp_path / "gains.png").stat().st_size > 10_000


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_alone(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    sg.examine(mlp(), cross_entropy, batches())
    out, err = capsys.readouterr()
    assert out == "" and ("batch 4" in err) is terminal


def test_sparse_gradients() -> None:
    model = nn.Sequential(nn.EmbeddingBag(11, 20, sparse=True), *mlp(3))
    given = [(torch.randint(11, (16, 3)), y) for _, y in batches()]
    cross_entropy(model(given[0][0]), given[0][1]).backward()
    before = model[0].weight.grad
    optimizer = torch.optim.SGD(model.parameters(), lr=1e5)
    found = sg.examine(model, cross_entropy, given, optimizer=optimizer)
    assert found.parameters[0].norm > 0 and model[0].weight.grad is before
    assert len(found.trials) > 1 and found.verdicts[0].kind == "lost"


def test_a_layer_whose_weight_is_computed_is_one_layer() -> None:
    parametrizations = nn.utils.parametrizations
    layers = parametrizations.spectral_norm(nn.Linear(20, 20)), nn.Linear(20, 5)
    model = nn.Sequential(layers[0], nn.GELU(), parametrizations.weight_norm(layers[1]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = sg.examine(model, cross_entropy, batches())
    assert [layer.name for layer in found.layers] == ["input", "0", "1", "2"] and found.depth == 2
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
