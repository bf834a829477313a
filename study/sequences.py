"""Define tasks over sequences: two of Pascanu et al. 2013, and the next character of a text."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from .tasks import Batch, Metric, Task

_TEST_SEQUENCES = 10_000
_TOGETHER = 1000
_HELD_OUT_SEED = 2013
# A task is solved when fewer than 1 % of the sequences are wrong (Martens and Sutskever 2011).
_SOLVED = 0.01
_ADDITION_TOLERANCE = 0.04
_TEST_PIECES = 400


class _Generated(Task):
    """Generates training sequences as they are needed, and a fixed test set.

    The metric is the share of 10,000 test sequences that are wrong. The training loss is taken on
    1,000 further sequences, which serve as training data since no sequence is ever seen twice.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        generator = torch.Generator().manual_seed(_HELD_OUT_SEED)
        self._test = self._draw(_TEST_SEQUENCES, generator)
        self._fixed = self._draw(1000, generator)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield self._draw(batch_size, generator)

    def training_loss(self, model: nn.Module) -> float:
        return self.loss(model(self._fixed[0]), self._fixed[1]).item()

    def measure(self, model: nn.Module) -> float | None:
        # The states of a part fit into a cache.
        outputs = torch.cat([model(part) for part in self._test[0].split(_TOGETHER)])
        if not bool(outputs.isfinite().all()):
            return None
        return self._wrong(outputs, self._test[1]).float().mean().item()

    @abstractmethod
    def _draw(self, count: int, generator: torch.Generator) -> Batch:
        """Draw ``count`` sequences and their targets."""

    @abstractmethod
    def _wrong(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return which outputs are wrong, as booleans."""


class TemporalOrder(_Generated):
    """Asks in which order two symbols came: the temporal-order problem of Pascanu et al. 2013.

    A sequence has A or B at two positions and one of four distractors at all others. The first of
    the two positions is random in the second tenth of the sequence, the other in the fifth. The
    class, asked for after the last symbol, is AA, AB, BA or BB. The task is solved when fewer than
    1 % of the sequences are wrong.

    Args:
        length: Length of a sequence, at least 10.
    """

    inputs = 6
    outputs = 4
    metric = Metric("test error", "lower", guessing=0.75, learned=_SOLVED, target=_SOLVED)

    def __init__(self, length: int) -> None:
        self.name = f"temporal order, {length} symbols (generated)"
        super().__init__(length)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets)

    def _draw(self, count: int, generator: torch.Generator) -> Batch:
        length, rows = self.length, torch.arange(count)
        symbols = torch.randint(2, 6, (count, length), generator=generator)
        first, second = (
            torch.randint(a * length // 10, b * length // 10, (count,), generator=generator)
            for a, b in ((1, 2), (4, 5))
        )
        marks = torch.randint(0, 2, (count, 2), generator=generator)
        symbols[rows, first], symbols[rows, second] = marks[:, 0], marks[:, 1]
        return one_hot(symbols, 6).float(), 2 * marks[:, 0] + marks[:, 1]

    def _wrong(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.argmax(1) != targets


class Addition(_Generated):
    """Asks for the sum of two marked numbers: the addition problem of Pascanu et al. 2013.

    Each position carries a number, uniform in [0, 1], and a mark. The mark is 1 at one position in
    the first tenth and at one in the rest of the first half, and 0 elsewhere. The target is half
    the sum of the two marked numbers. The task is solved when fewer than 1 % of the sequences are
    off by more than 0.04.

    Args:
        length: Length of a sequence, at least 10.
    """

    inputs = 2
    outputs = 1

    def __init__(self, length: int) -> None:
        self.name = f"addition, {length} numbers (generated)"
        # A constant answer of .5, the mean target, is right where the sum lies within .08 of 1.
        guessing = (1 - 2 * _ADDITION_TOLERANCE) ** 2
        self.metric = Metric("test error", "lower", guessing, learned=_SOLVED, target=_SOLVED)
        super().__init__(length)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(outputs[:, 0], targets)

    def _draw(self, count: int, generator: torch.Generator) -> Batch:
        length, rows = self.length, torch.arange(count)
        numbers = torch.rand(count, length, generator=generator)
        first = torch.randint(0, length // 10, (count,), generator=generator)
        second = torch.randint(length // 10, length // 2, (count,), generator=generator)
        marks = torch.zeros(count, length)
        marks[rows, first] = marks[rows, second] = 1.0
        return torch.stack([numbers, marks], 2), (numbers * marks).sum(1) / 2

    def _wrong(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets).abs() > _ADDITION_TOLERANCE


@lru_cache(maxsize=1)
def python_help() -> str:
    """Return the help texts of CPython (``pydoc_data.topics``), in alphabetical order of topics."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


class NextCharacter(Task):
    """Asks for the next character of a text, given those before it.

    The last tenth of the text is held out. Batches are pieces of ``length`` characters from random
    places. The metric is the cross-entropy on the first 400 held-out pieces, in bits per
    character; each piece is read from an empty state. Guessing by the frequencies of the characters
    gets their entropy. A model has learned if its metric is at most three quarters of that.

    Args:
        text: Text to learn. Default: the help texts of CPython, 465,000 characters in 3.11.
        length: Number of characters of a piece. Default: 64.
        target: Bits per character that ``steps_to_target`` waits for. Default: 3.
    """

    def __init__(self, text: str | None = None, length: int = 64, target: float = 3.0) -> None:
        self.name = "the help texts of CPython" if text is None else "a text"
        text = python_help() if text is None else text
        self.length = length
        alphabet = {character: index for index, character in enumerate(sorted(set(text)))}
        codes = torch.tensor([alphabet[character] for character in text])
        held_out = max(len(codes) // 10, length + 1)
        if len(codes) - held_out <= length:
            raise ValueError(
                f"NextCharacter: text: expected more than {11 * (length + 1)} characters, got {len(codes)}"
            )
        self._train, test = codes[:-held_out], codes[-held_out:]
        self._test = _pieces(test, length)[:_TEST_PIECES]
        self._fixed = _pieces(self._train, length)[:: max(1, len(self._train) // length // 200)]
        self.inputs = self.outputs = len(alphabet)
        shares = torch.bincount(self._train).double() / len(self._train)
        shares = shares[shares > 0]
        entropy = float(-(shares * shares.log2()).sum())
        self.metric = Metric("bits per character", "lower", entropy, 0.75 * entropy, target)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        places = torch.arange(self.length + 1)
        while True:
            highest = len(self._train) - self.length
            starts = torch.randint(0, highest, (batch_size,), generator=generator)
            pieces = self._train[starts[:, None] + places]
            yield pieces[:, :-1], pieces[:, 1:]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # The loss is in nats, a mean over all characters.
        return cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def training_loss(self, model: nn.Module) -> float:
        return self._loss_on(model, self._fixed)

    def measure(self, model: nn.Module) -> float | None:
        bits = self._loss_on(model, self._test) / math.log(2)
        return bits if math.isfinite(bits) else None

    def _loss_on(self, model: nn.Module, pieces: Tensor) -> float:
        return self.loss(model(pieces[:, :-1]), pieces[:, 1:]).item()


def _pieces(codes: Tensor, length: int) -> Tensor:
    """Cut a text into pieces that overlap by one character, ``(pieces, length + 1)``."""
    return codes.unfold(0, length + 1, length)
