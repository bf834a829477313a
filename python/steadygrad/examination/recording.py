"""Records what hooks see of forward and backward passes: calls of layers, and activation functions."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_SATURATED = 0.99  # There tanh passes on 2 % of the gradient, and a sigmoid 1 %.
_KINDS = {"relu": "ReLU", "tanh": "tanh", "sigmoid": "sigmoid", "_softmax": "softmax"}


class Numbers(NamedTuple):
    """Holds a tensor's root mean square, norm, deviation and largest magnitude."""

    rms: float
    norm: float
    std: float
    largest: float


@dataclass
class Layer:
    """Describes one call of a layer, which is a module that calls no other module.

    Attributes:
        name: Name of the module, as in ``model.named_modules()``; ``"input"`` for the model's input.
        call: Number of the call of that module within a forward pass, from 0.
        kind: Class of the module.
        has_weight: Whether the module has a parameter of two or more dimensions.
        dtype: Dtype of the output.
        outputs: Numbers of the output, by batch.
        gradients: Numbers of the loss's gradient with respect to the output, by batch.
        gain: Root mean square of the output, divided by that of the layer before.
        gradient_gain: Norm of the gradient, divided by that of the layer after.
        lost: Share of the gradient's elements that round to 0 in fp16; NaN for a layer that does not compute in fp16.
    """

    name: str
    call: int
    kind: str
    has_weight: bool
    dtype: torch.dtype
    outputs: dict[int, Numbers] = field(default_factory=dict)
    gradients: dict[int, Numbers] = field(default_factory=dict)
    gain: float = math.nan
    gradient_gain: float = math.nan
    lost: float = math.nan

    @property
    def rms(self) -> float:
        """Returns the root mean square of the output, the median over the batches."""
        return statistics.median(numbers.rms for numbers in self.outputs.values())

    @property
    def gradient_norm(self) -> float:
        """Returns the norm of the gradient, the median over the batches; NaN if there is none."""
        norms = [numbers.norm for numbers in self.gradients.values()]
        return statistics.median(norms) if norms else math.nan


@dataclass
class Units:
    """Describes what an activation function did, over all batches.

    Attributes:
        name: Name of the module that calls it.
        kind: ``"ReLU"``, ``"tanh"``, ``"sigmoid"`` or ``"softmax"``.
        share: For a ReLU, the share of units that were 0 for every example; for tanh and a sigmoid, the share of
            outputs that are saturated (beyond 0.99 for tanh, 0.01 and 0.99 for a sigmoid); for a softmax, its entropy
            divided by that of a uniform distribution.
    """

    name: str
    kind: str
    share: float = 0.0
    _count: int = field(default=0, repr=False)
    _alive: Tensor | None = field(default=None, repr=False)

    def add(self, output: Tensor, channels: int, dim: int = -1) -> None:
        """Counts an output, whose units are along dimension ``channels``; a softmax is over dimension ``dim``."""
        values = output.detach().float()
        if self.kind == "ReLU":
            alive = (values > 0).movedim(channels, 0).flatten(1).any(1)
            if self._alive is not None and self._alive.shape == alive.shape:
                alive |= self._alive
            self._alive = alive
            self.share = 1 - float(alive.float().mean())
            return
        if self.kind == "softmax":
            options = (values > 0).sum(dim).clamp_min(2).float()
            shares = torch.special.entr(values).sum(dim) / options.log()
        else:
            middle = 0.0 if self.kind == "tanh" else 0.5
            shares = ((values - middle).abs() > _SATURATED - middle).float()
        self._count += 1
        self.share += (float(shares.mean()) - self.share) / self._count


class Recorder(TorchDispatchMode):
    """Records a model's forward passes, and the backward pass after each.

    ``layers`` and ``units`` are in the order of execution; the model's input is the first layer. ``underflow`` says
    whether to count what fp16 would lose.
    """

    def __init__(self, model: nn.Module, underflow: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.underflow, self.batch = model, underflow, -1
        self.layers: dict[tuple[str, int], Layer] = {}
        self.units: dict[tuple[str, str, int], Units] = {}
        self._stack: list[tuple[str, nn.Module, int]] = []
        self._calls: Counter[Any] = Counter()
        self._seen: list[Layer] = []

    @contextlib.contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Records the forward pass of the next batch; what backward computes again is not recorded."""
        self.batch += 1
        for kept in (self._stack, self._calls, self._seen):
            kept.clear()
        with contextlib.ExitStack() as stack:
            for name, module in self.model.named_modules():
                if "parametrizations" in name.split("."):
                    continue  # The module computes a weight and is no layer of the network.
                stack.callback(module.register_forward_pre_hook(self._entering(name)).remove)
                stack.callback(module.register_forward_hook(self._leaving).remove)
            with self:
                yield

    def _entering(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            if not self._stack:
                self._see("input", self.model, inputs)
            self._stack.append((name, module, len(self._seen)))

        return hook

    def _leaving(self, module: nn.Module, inputs: Any, output: Any) -> None:
        name, _, seen = self._stack.pop()
        if len(self._seen) == seen:
            self._see(name, module, output)

    def _see(self, name: str, module: nn.Module, value: Any) -> None:
        """Records the first dense floating-point tensor of a value as the output of a layer."""
        dense = (t for t in tensors(value) if t.layout == torch.strided and t.numel())
        tensor = next((t for t in dense if t.is_floating_point()), None)
        if tensor is None:
            return
        call = self._calls[name]
        self._calls[name] += 1
        if (name, call) not in self.layers:
            weight = name != "input" and any(p.dim() > 1 for p in module.parameters())
            new = Layer(name, call, type(module).__name__, weight, tensor.dtype)
            self.layers[name, call] = new
        layer, batch = self.layers[name, call], self.batch
        self._seen.append(layer)
        layer.outputs[batch] = _numbers(tensor)
        # A batch norm with fused ReLU has this attribute.
        if getattr(module, "activation", None) == "relu":
            self._count("ReLU", name, module, tensor)

        def add(gradient: Tensor) -> None:
            layer.gradients[batch] = _numbers(gradient)
            if self.underflow:
                present, left = gradient.count_nonzero(), gradient.half().count_nonzero()
                layer.lost = float((present - left) / present.clamp_min(1))

        if tensor.requires_grad and name != "input":
            tensor.register_hook(add)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Looks at the outputs of activation functions, whoever calls them."""
        output = func(*args, **(kwargs or {}))
        kind = _KINDS.get(func._schema.name.removeprefix("aten::").removesuffix("_"))
        if kind and self._stack and output.numel():
            name, module, _ = self._stack[-1]
            self._count(kind, name, module, output, args[1] if kind == "softmax" else -1)
        return output

    def _count(
        self, kind: str, name: str, module: nn.Module, output: Tensor, dim: int = -1
    ) -> None:
        call = 0
        if not isinstance(module, nn.RNNBase):  # An RNN has the same units at every step.
            call = self._calls[name, kind]
            self._calls[name, kind] += 1
        last = self._seen[-1].kind if self._seen else ""
        channels = 1 if output.dim() > 3 or (output.dim() == 3 and last.endswith("1d")) else -1
        self.units.setdefault((name, kind, call), Units(name, kind)).add(output, channels, dim)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def _numbers(tensor: Tensor) -> Numbers:
    values = tensor.detach()
    values = values.float() if values.element_size() < 4 else values
    low, high = values.aminmax()
    # The squares may exceed the range of fp32.
    wide = torch.linalg.vector_norm(values, dtype=torch.float64)
    sums = [wide, values.mean().double(), torch.maximum(-low, high).double()]
    norm, mean, largest = torch.stack(sums).tolist()
    rms = norm / math.sqrt(values.numel())
    std = math.sqrt(max(rms * rms - mean * mean, 0.0)) if math.isfinite(norm) else math.nan
    return Numbers(rms, norm, std, largest)
