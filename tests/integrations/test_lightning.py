"""Real training with Lightning: plain use, resuming, precisions, the monitor, two clippers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import steadygrad as sg
from tests.digit_training import BATCH, OPTIMIZERS, ROUNDED, dataset, loss_of, network
from tests.snapshots import assert_same_tree

lightning = pytest.importorskip("lightning")
pl = lightning.pytorch

from steadygrad.integrations.lightning import StabilizerMonitor  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Lightning itself gives this warning under torch 2.13, and on few cores.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
BATCHES = 8


class DigitTraining:
    """Trains with any optimizer; mixed into the LightningModule of either package."""

    def __init__(
        self, make: Callable[[Any], Any], manual: bool = False, spoiled: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.network = network()
        self.make, self.automatic_optimization, self.spoiled = make, not manual, spoiled
        self.losses: list[float] = []
        self.norms: list[float] = []

    def training_step(self: Any, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = loss_of(self.network, (batch[0].to(self.dtype), batch[1]))
        self.losses.append(loss.item())
        if index in self.spoiled:
            loss = loss * math.nan
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.norms.append(float(optimizer.grad_norm))
            self.lr_schedulers().step()
        return loss

    def configure_optimizers(self: Any) -> Any:
        optimizer = self.make(self.parameters())
        return [optimizer], [{"scheduler": schedule(optimizer), "interval": "step"}]


class Digits(DigitTraining, pl.LightningModule):
    pass


def schedule(optimizer: Any) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)


def trainer(folder: Path, library: Any = pl, **options: Any) -> Any:
    given: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        **options,
    }
    return library.Trainer(**given)


def loader() -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(dataset(BATCHES), batch_size=BATCH)


def fitted(folder: Path, module: Any, ckpt_path: str | None = None, **options: Any) -> Any:
    """Return the Trainer after it has fitted the module."""
    made = trainer(folder, **options)
    made.fit(module, loader(), ckpt_path=ckpt_path)
    return made


def fell(losses: list[float]) -> bool:
    return sum(losses[-BATCHES:]) < 0.8 * sum(losses[:BATCHES])


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_plain_use_takes_the_steps_of_a_loop_without_it(
    tmp_path: Path, kind: str, manual: bool
) -> None:
    module = Digits(OPTIMIZERS[kind], manual)
    done = fitted(tmp_path, module, max_epochs=4)
    assert done.global_step == 4 * BATCHES and fell(module.losses)

    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    scheduler = schedule(optimizer)
    norms = []
    for _ in range(4):
        for batch in loader():
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
            norms.append(float(optimizer.grad_norm))
            scheduler.step()
    assert_same_tree(module.network.state_dict(), model.state_dict())
    assert_same_tree(done.optimizers[0].state_dict(), optimizer.state_dict())
    assert done.optimizers[0].path == optimizer.path
    if manual:
        assert module.norms == norms


RESUMED = [(kind, False) for kind in (*OPTIMIZERS, *ROUNDED)]
RESUMED += [(kind, True) for kind in ("policies", "subclass", "stochastic")]


@pytest.mark.parametrize(("kind", "manual"), RESUMED)
def test_resuming_from_a_checkpoint(tmp_path: Path, kind: str, manual: bool) -> None:
    options: dict[str, Any] = {"enable_checkpointing": True}
    if kind in ROUNDED:
        options["precision"] = "bf16-true"
    make = ROUNDED.get(kind) or OPTIMIZERS[kind]

    def started() -> Digits:
        return Digits(make, manual, spoiled=(5,))

    def saving() -> Any:
        return pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)

    straight = started()
    done = fitted(tmp_path, straight, max_epochs=4, callbacks=[saving()], **options)
    assert done.optimizers[0].skipped_steps == 4 and fell(straight.losses)
    resumed = started()
    path = str(tmp_path / "epoch=1.ckpt")
    again = fitted(tmp_path, resumed, ckpt_path=path, max_epochs=4, callbacks=[saving()], **options)
    assert resumed.losses == straight.losses[2 * BATCHES :]
    assert again.global_step == done.global_step
    assert_same_tree(resumed.state_dict(), straight.state_dict())
    assert_same_tree(again.optimizers[0].state_dict(), done.optimizers[0].state_dict())
    schedulers = [t.lr_scheduler_configs[0].scheduler.state_dict() for t in (again, done)]
    assert_same_tree(*schedulers)


@pytest.mark.parametrize("kind", ["policies", "subclass"])
def test_accumulated_batches(tmp_path: Path, kind: str) -> None:
    module = Digits(OPTIMIZERS[kind])
    done = fitted(tmp_path, module, max_epochs=8, accumulate_grad_batches=4)
    assert done.global_step == 8 * BATCHES / 4 and fell(module.losses)
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    scheduler = schedule(optimizer)
    for index, batch in enumerate([batch for _ in range(8) for batch in loader()], start=1):
        (loss_of(model, batch) / 4).backward()
        if index % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    assert_same_tree(module.network.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", ["max_norm", "subclass"])
def test_bf16_mixed_precision(tmp_path: Path, kind: str) -> None:
    module = Digits(OPTIMIZERS[kind])
    done = fitted(tmp_path, module, max_epochs=5, precision="bf16-mixed")
    assert fell(module.losses) and done.optimizers[0].path == "fused"


# The scale begins far too large, so that more than twenty steps are skipped.
@pytest.mark.filterwarnings("ignore:step. 20 steps in a row were skipped:RuntimeWarning")
def test_a_loss_scale(tmp_path: Path) -> None:
    # On a CPU the Trainer would use bf16 instead of fp16, so it is given the plugin.
    scaler = sg.GradScaler("cpu", init_scale=2.0**40, growth_interval=4)
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    module = Digits(OPTIMIZERS["max_norm"])
    done = fitted(tmp_path, module, max_epochs=5, plugins=[plugin])
    optimizer = done.optimizers[0]
    assert fell(module.losses)
    assert optimizer.skipped_steps >= 10 and scaler.get_scale() < 2.0**30
    assert 0 < float(optimizer.grad_norm) < 100


@pytest.mark.parametrize("library", ["lightning.pytorch", "pytorch_lightning"])
def test_the_monitor_logs_and_names(tmp_path: Path, library: str) -> None:
    used = pytest.importorskip(library)
    module = type("Digits", (DigitTraining, used.LightningModule), {})(
        lambda p: sg.optim.AdamW(p, lr=0.01, max_norm=0.5, telemetry="tensor"), spoiled=(5,)
    )
    log = used.loggers.CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    done = trainer(
        tmp_path,
        used,
        logger=log,
        max_epochs=2,
        log_every_n_steps=2,
        callbacks=[StabilizerMonitor()],
    )
    done.fit(module, loader())
    optimizer = done.optimizers[0]
    assert optimizer.telemetry.names == tuple(name for name, _ in module.named_parameters())
    rows = [
        line.split(",")
        for line in (Path(log.log_dir) / "metrics.csv").read_text().splitlines()
        if "steadygrad" in line or line.split(",")[-1]
    ]
    columns = {name: [row[place] for row in rows[1:]] for place, name in enumerate(rows[0])}
    assert columns["step"] == [str(step) for step in range(2, 17, 2)]
    assert columns["steadygrad/skipped_steps"] == ["0.0"] * 2 + ["1.0"] * 4 + ["2.0"] * 2
    norms = [float(value) for value in columns["steadygrad/grad_norm"]]
    want = optimizer.telemetry.norm[1::2].tolist()
    assert norms == pytest.approx(want, rel=1e-6, nan_ok=True) and math.isnan(norms[2])
    limits = [float(value) for value in columns["steadygrad/limit"]]
    assert limits == [0.5] * len(limits)
    assert float(done.callback_metrics["steadygrad/grad_norm"]) == norms[-1]
    assert "exploded  step 5: network." in str(optimizer.report())


def test_the_monitor_with_several_optimizers_and_one_of_torchs(tmp_path: Path) -> None:
    class Pair(Digits):
        def __init__(self) -> None:
            super().__init__(OPTIMIZERS["max_norm"], manual=True)
            self.second = network()

        def training_step(self, batch: Any, index: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            first, second = loss_of(self.network, batch), loss_of(self.second, batch)
            self.manual_backward(first + 2 * second)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            last = list(self.second.parameters())
            return [
                OPTIMIZERS["max_norm"](self.network.parameters()),
                OPTIMIZERS["policies"](last[:2]),
                torch.optim.SGD(last[2:], lr=0.1),
            ]

    done = fitted(tmp_path, Pair(), max_epochs=1, callbacks=[StabilizerMonitor(every=3)])
    found = done.callback_metrics
    assert {f"steadygrad/{number}/grad_norm" for number in (0, 1)} <= set(found)
    assert not any(name.startswith("steadygrad/2") for name in found)


def test_impossible_intervals() -> None:
    with pytest.raises(ValueError, match="StabilizerMonitor: every: expected an int >= 1"):
        StabilizerMonitor(every=0)


@pytest.mark.parametrize("kind", ["max_norm", "policies", "none"])
def test_two_clippers_are_explained(tmp_path: Path, kind: str) -> None:
    make = OPTIMIZERS.get(kind) or (lambda p: sg.optim.SGD(p, lr=0.1))
    module = Digits(make)
    made = trainer(tmp_path, max_epochs=1, gradient_clip_val=0.01, callbacks=[StabilizerMonitor()])
    with pytest.warns(UserWarning, match=r"Trainer\(gradient_clip_val=0.01\) clips") as found:
        made.fit(module, loader())
    message = next(str(w.message) for w in found if "gradient_clip_val" in str(w.message))
    assert ("two clippers" in message) == (kind != "none")
    assert ("Give the optimizer max_norm=0.01" in message) == (kind == "none")
    assert "leave gradient_clip_val out" in message
    # As the warning says, the optimizer saw only what Lightning had left.
    assert float(made.optimizers[0].grad_norm) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_two_clippers_in_mixed_precision(tmp_path: Path, precision: str) -> None:
    plugin = pl.plugins.MixedPrecision(
        precision, "cpu", sg.GradScaler("cpu") if precision == "16-mixed" else None
    )
    made = trainer(
        tmp_path,
        max_epochs=1,
        plugins=[plugin],
        gradient_clip_val=0.5,
        callbacks=[StabilizerMonitor()],
    )
    refused = pytest.raises(RuntimeError, match="does not allow for gradient clipping")
    explained = pytest.warns(UserWarning, match=f"Lightning refuses with precision='{precision}'")
    with explained, refused:
        made.fit(Digits(OPTIMIZERS["max_norm"]), loader())


def test_one_clipper_is_no_reason_to_warn(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fitted(
            tmp_path, Digits(OPTIMIZERS["policies"]), max_epochs=1, callbacks=[StabilizerMonitor()]
        )
        plain = Digits(lambda p: torch.optim.SGD(p, lr=0.1))
        both = {"gradient_clip_val": 0.5, "callbacks": [StabilizerMonitor()]}
        fitted(tmp_path, plain, max_epochs=1, **both)
    assert not [w for w in found if "steadygrad" in str(w.message)]


def test_steps_skipped_in_a_row_stop_the_trainer(tmp_path: Path) -> None:
    settings = sg.Telemetry(stop_after_skips=3)
    module = Digits(
        lambda p: sg.optim.SGD(p, lr=0.1, telemetry=settings), spoiled=tuple(range(2, 8))
    )
    with pytest.raises(sg.TooManySkippedSteps, match="skipped"):
        fitted(tmp_path, module, max_epochs=1)
    assert len(module.losses) == 5


def test_fabric() -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    bare: nn.Module = network()
    model, optimizer = fabric.setup(bare, OPTIMIZERS["subclass"](bare.parameters()))
    losses = []
    for _ in range(4):
        for batch in loader():
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            fabric.backward(loss)
            optimizer.step()
            losses.append(loss.item())
    assert fell(losses)
    assert float(optimizer.grad_norm) > 0 and optimizer.path == "fused"
    assert optimizer.state_dict()["param_groups"][0]["clip_state"] is not None


@pytest.mark.parametrize(
    ("make", "listed"),
    [
        (lambda params: sg.optim.AdamW(params, max_norm=1.0), ["lr-AdamW"]),
        # Lightning takes anything with an `optimizer` for DeepSpeed's wrapper, which no scheduler knows.
        (lambda params: sg.Stabilizer(torch.optim.AdamW(params)), ["lr-Stabilizer", "lr-AdamW"]),
    ],
)
def test_the_rates_that_lightnings_own_monitor_lists(
    tmp_path: Path, make: Callable[[Any], Any], listed: list[str]
) -> None:
    rates = pl.callbacks.LearningRateMonitor("step")
    logger = pl.loggers.CSVLogger(tmp_path)
    options = {"logger": logger, "callbacks": [rates], "log_every_n_steps": 1}
    fitted(tmp_path, Digits(make), max_steps=2, **options)
    assert list(rates.lrs) == listed
    assert all(values == rates.lrs[listed[0]] for values in rates.lrs.values())
