"""Tests that an examination changes nothing, however it ends."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import steadygrad as sg
from tests.examination.networks import Batch, Everything, batches, cross_entropy, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return all that an examination could change, in a form that can be compared."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {
        (place, key): value
        for place, entry in enumerate(optimizer.state.values())
        for key, value in entry.items()
    }
    bits = {
        **{("tensor", name): t for name, t in tensors.items()},
        **{("grad", name): t.grad for name, t in tensors.items() if t.grad is not None},
        **{("state", *key): torch.as_tensor(t) for key, t in state.items()},
    }
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    numpy: Any = np.random.get_state()
    return {
        "bits": {key: t.detach().numpy().tobytes() for key, t in bits.items()},
        "objects": {key: id(t) for key, t in bits.items()},
        "versions": {name: t._version for name, t in model.named_parameters()},
        "flags": {name: t.requires_grad for name, t in tensors.items()},
        "modes": [module.training for module in model.modules()],
        "hooks": [[dict(vars(m)[key]) for key in hooks] for m in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "rates": [group["lr"] for group in optimizer.param_groups],
        "python": random.getstate(),
        "numpy": (numpy[1].tobytes(), *numpy[2:]),
        "torch": torch.get_rng_state().numpy().tobytes(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def trained() -> tuple[Everything, torch.optim.Optimizer]:
    """Return a model with state, gradients, a frozen parameter, a hook, and one module in another mode."""
    model = Everything()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs, labels = batches(1)[0]
    cross_entropy(model(inputs), labels).backward()
    optimizer.step()
    model.conv.bias.requires_grad_(False)
    model.norm.eval()
    model.last.register_forward_hook(lambda module, inputs, output: None)
    model.calls, model.kept = 0, []
    return model, optimizer


def noisy_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return a loss that draws from every generator, and changes what it should not."""
    random.random(), np.random.rand(), torch.rand(1)
    model.train()
    return cross_entropy(model(batch[0]), batch[1])


def breaking_off(after: int, error: type[BaseException]) -> Iterator[Batch]:
    yield from batches(after)
    raise error


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_everything_is_as_before(grad_mode: Any) -> None:
    model, optimizer = trained()
    before, given = everything(model, optimizer), batches()
    with grad_mode():
        found = sg.examine(model, noisy_loss, given, optimizer=optimizer)
    assert len(found.losses) == 4 and found.sharpness == found.sharpness
    assert everything(model, optimizer) == before
    assert model.calls == 0 and model.kept == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", ["batches", "loss", "backward", "forward"])
def test_everything_is_as_before_when_it_is_interrupted(
    place: str, error: type[BaseException]
) -> None:
    model, optimizer = trained()
    calls = 0

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        loss = noisy_loss(model, batch)
        if calls == 3 and place == "loss":
            raise error
        if calls == 3 and place == "backward":
            loss.register_hook(raising)
        return loss

    def raising(*given: Any) -> None:
        if calls == 3 or place == "forward":
            raise error

    if place == "forward":
        model.attention.register_forward_pre_hook(raising)
    given = breaking_off(2, error) if place == "batches" else batches()
    before = everything(model, optimizer)
    with pytest.raises(error):
        sg.examine(model, loss_fn, given, optimizer=optimizer)
    assert everything(model, optimizer) == before


def test_interrupted_while_remedies_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp(20, gain=2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def interrupted(*given: Any, **options: Any) -> None:
        torch.rand(1)
        raise KeyboardInterrupt

    monkeypatch.setattr("steadygrad.examination.trials._try", interrupted)
    before = everything(model, optimizer)
    with pytest.raises(KeyboardInterrupt):
        sg.examine(model, cross_entropy, batches(), optimizer=optimizer)
    assert everything(model, optimizer) == before


def test_inputs_that_require_a_gradient_get_none() -> None:
    model, given = mlp(), batches(2)
    for inputs, _ in given:
        inputs.requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    found = sg.examine(model, cross_entropy, given, optimizer=optimizer)
    assert len(found.trials) > 1 and all(inputs.grad is None for inputs, _ in given)


def test_a_loader_with_a_generator_gives_the_same_batches_afterwards() -> None:
    inputs, labels = batches(1, examples=64)[0]
    generator = torch.Generator().manual_seed(3)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, labels), 16, shuffle=True, generator=generator
    )
    before = generator.get_state()
    sg.examine(mlp(), cross_entropy, loader)
    assert torch.equal(generator.get_state(), before)


def test_a_graph_of_the_caller_is_still_good() -> None:
    model = Everything()
    model.norm.eval()
    inputs, labels = batches(1)[0]
    loss = cross_entropy(model(inputs), labels)
    sg.examine(model, cross_entropy, batches())
    loss.backward()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_what_a_forward_left_on_a_module_is_no_hindrance() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(20, 8)), nn.Linear(8, 5))
    loss = cross_entropy(model(batches(1)[0][0]), batches(1)[0][1])
    left = model[0].weight
    sg.examine(model, cross_entropy, batches())
    assert model[0].weight is left and left.grad_fn is not None
    loss.backward()


def graphs() -> list[Tensor]:
    gc.collect()
    return [t for t in gc.get_objects() if type(t) is Tensor and t.grad_fn is not None]


def test_nothing_keeps_the_graph_or_the_batches() -> None:
    model = mlp()
    others = graphs()  # graphs of earlier tests in the same process
    given = batches()
    seen = [weakref.ref(batch[0]) for batch in given]
    found = sg.examine(
        model, cross_entropy, given, optimizer=torch.optim.SGD(model.parameters(), 10.0)
    )
    assert found.trials
    del given
    left = [t for t in graphs() if all(t is not other for other in others)]
    assert [reference() for reference in seen] == [None] * 4
    assert left == []


def test_buffers_that_are_replaced_are_put_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(20, 5)
            self.register_buffer("steps", torch.tensor(float("nan")))

        def forward(self, x: Tensor) -> Tensor:
            self.steps = torch.ones(())
            out: Tensor = self.linear(x)
            return out

    model = Counting()
    before = model.steps
    sg.examine(model, cross_entropy, batches())
    assert model.steps is before and bool(before.isnan())
