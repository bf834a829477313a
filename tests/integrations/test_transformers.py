"""Real training with Hugging Face's Trainer: both ways to pass an optimizer, resuming, the callback, two clippers."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import steadygrad as sg
from tests.digit_training import OPTIMIZERS, ROUNDED
from tests.integrations.text_training import Text, language_model
from tests.snapshots import assert_same_tree

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from steadygrad.integrations.transformers import StabilizerCallback  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "offline")
STEPS = 24


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(logging.ERROR)
    yield
    transformers.utils.logging.set_verbosity(before)


def trainer(
    folder: Path,
    make: Callable[[Any], Any] | None,
    dtype: torch.dtype = torch.float32,
    **given: Any,
) -> Any:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_grad_norm": 0.0,
        **given,
    }
    own = {
        key: options.pop(key) for key in ("callbacks", "optimizer_cls_and_kwargs") if key in options
    }
    model = language_model(dtype)
    if make is not None:
        optimizer = make(model.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2 * STEPS)
        own["optimizers"] = (optimizer, schedule)
    return transformers.Trainer(
        model, transformers.TrainingArguments(**options), train_dataset=Text(160), **own
    )


def optimizer_of(trained: Any) -> Any:
    """Return our optimizer from inside accelerate's."""
    return trained.optimizer.optimizer


def losses(trained: Any) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def fell(found: list[float]) -> bool:
    return sum(found[-5:]) < 0.9 * sum(found[:5])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_and_its_scheduler(tmp_path: Path, kind: str) -> None:
    trained = trainer(tmp_path, OPTIMIZERS[kind])
    trained.train()
    optimizer = optimizer_of(trained)
    assert len(losses(trained)) == STEPS and fell(losses(trained))
    first = optimizer.param_groups[0]
    assert first["lr"] == pytest.approx(first["initial_lr"] / 2)
    assert optimizer.path.startswith("in-place" if kind == "in-place" else "fused")
    # This is the Trainer's own norm, which it computes before the step.
    logged = [entry["grad_norm"] for entry in trained.state.log_history if "loss" in entry]
    assert float(optimizer.grad_norm) == pytest.approx(logged[-1], rel=1e-5)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_class_and_its_arguments(tmp_path: Path, name: str) -> None:
    arguments = {"lr": 0.01 if name == "AdamW" else 0.5, "max_norm": 0.5}
    trained = trainer(tmp_path, None, optimizer_cls_and_kwargs=(getattr(sg.optim, name), arguments))
    trained.train()
    optimizer = optimizer_of(trained)
    assert type(optimizer) is getattr(sg.optim, name) and len(optimizer.param_groups) == 2
    assert fell(losses(trained)) and optimizer.clipped_steps > 0
    # The Trainer's linear schedule has ended.
    assert optimizer.param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize("kind", [*OPTIMIZERS, *ROUNDED])
def test_resuming_from_a_checkpoint(tmp_path: Path, kind: str) -> None:
    make = ROUNDED.get(kind) or OPTIMIZERS[kind]
    dtype = torch.bfloat16 if kind in ROUNDED else torch.float32
    saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
    straight = trainer(tmp_path, make, dtype, **saving)
    straight.train()
    assert fell(losses(straight))
    resumed = trainer(tmp_path / "again", make, dtype)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert losses(resumed) == losses(straight)
    assert_same_tree(resumed.model.state_dict(), straight.model.state_dict())
    assert_same_tree(optimizer_of(resumed).state_dict(), optimizer_of(straight).state_dict())
    assert_same_tree(resumed.lr_scheduler.state_dict(), straight.lr_scheduler.state_dict())


def test_accumulated_batches(tmp_path: Path) -> None:
    whole = trainer(tmp_path, OPTIMIZERS["subclass"], max_steps=10)
    parts = trainer(
        tmp_path,
        OPTIMIZERS["subclass"],
        max_steps=10,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    for one in (whole, parts):
        for module in one.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # the masks would be different
        one.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-3)
    assert optimizer_of(parts).grad_norm.item() == pytest.approx(
        optimizer_of(whole).grad_norm.item(), rel=1e-2
    )


def test_the_callback_adds_to_the_logs(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            seen.append(dict(logs))

    def make(params: Any) -> Any:
        return sg.optim.AdamW(params, lr=0.01, max_norm=0.5, telemetry="tensor")

    callback = StabilizerCallback()
    trained = trainer(
        tmp_path, make, logging_steps=4, callbacks=[Reporter(), callback], save_strategy="steps"
    )
    assert callback.put_first(trained) is callback
    assert trained.callback_handler.callbacks.count(callback) == 1
    trained.train()
    optimizer = optimizer_of(trained)
    entries = [entry for entry in trained.state.log_history if "loss" in entry]
    norms = [entry["steadygrad/grad_norm"] for entry in entries]
    assert norms == pytest.approx(optimizer.telemetry.norm[3::4].tolist(), rel=1e-6)
    assert norms == pytest.approx([entry["grad_norm"] for entry in entries], rel=1e-4)
    assert [entry["steadygrad/limit"] for entry in entries] == [0.5] * len(entries)
    assert entries[-1]["steadygrad/clipped_steps"] == optimizer.clipped_steps > 0
    # A reporter that was registered before the callback sees the same keys.
    assert [logs["steadygrad/grad_norm"] for logs in seen if "loss" in logs] == norms
    assert not any("steadygrad/grad_norm" in logs for logs in seen if "train_runtime" in logs)
    assert "transformer.h.0.attn.c_attn.weight" in optimizer.telemetry.names
    saved = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert saved["log_history"][0]["steadygrad/grad_norm"] == norms[0]


@pytest.mark.parametrize("kind", ["max_norm", "in-place"])
def test_two_clippers_are_explained(tmp_path: Path, kind: str) -> None:
    trained = trainer(
        tmp_path, OPTIMIZERS[kind], max_steps=2, max_grad_norm=0.01, callbacks=[StabilizerCallback]
    )
    with pytest.warns(UserWarning, match=r"two clippers: .*max_grad_norm=0.01") as found:
        trained.train()
    assert "write max_grad_norm=0" in str(found[0].message)
    assert float(optimizer_of(trained).grad_norm) == pytest.approx(0.01, rel=1e-3)


def test_one_clipper_is_no_reason_to_warn(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        options = {"max_steps": 2, "callbacks": [StabilizerCallback]}
        trainer(tmp_path, OPTIMIZERS["policies"], **options).train()
        trainer(tmp_path, None, max_grad_norm=1.0, **options).train()
    assert not [w for w in found if "steadygrad" in str(w.message)]


@pytest.mark.parametrize("nonfinite", ["skip", "zero"])
def test_a_gradient_that_is_not_finite(tmp_path: Path, nonfinite: Any) -> None:
    def make(params: Any) -> Any:
        return sg.optim.AdamW(
            params, lr=0.01, max_norm=1.0, nonfinite=nonfinite, telemetry="tensor"
        )

    trained = trainer(tmp_path, make, max_steps=6)
    calls = []

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return grad * (math.nan if len(calls) == 3 else 1)

    trained.model.transformer.wpe.weight.register_hook(spoil)
    trained.train()
    optimizer = optimizer_of(trained)
    assert all(p.isfinite().all() for p in trained.model.parameters())
    assert optimizer.skipped_steps == (1 if nonfinite == "skip" else 0)
    # The Trainer's own norm was NaN, and has multiplied all gradients by it before the step.
    counts = optimizer.telemetry.tensor_nonfinite[2]
    sizes = [p.numel() for p in trained.model.parameters()]
    assert counts.tolist() == sizes
