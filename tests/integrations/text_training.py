"""A language model of a few thousand parameters on the text of Python's documentation, without a download."""

from __future__ import annotations

import pydoc_data.topics
from typing import Any

import torch
from torch import Tensor

CONTEXT = 32


class Text(torch.utils.data.Dataset[dict[str, Tensor]]):
    """``count`` pieces of bytes, int64, in the form that a causal language model takes."""

    def __init__(self, count: int) -> None:
        topics = pydoc_data.topics.topics
        text = "\n".join(topics[name] for name in sorted(topics)).encode()
        pieces = torch.tensor(list(text[: count * CONTEXT])).view(count, CONTEXT)
        self.pieces: list[dict[str, Tensor]] = [{"input_ids": p, "labels": p} for p in pieces]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.pieces[index]


def language_model(dtype: torch.dtype = torch.float32) -> Any:
    """Return a GPT-2 of two small layers, with the same random weights on every call."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(7)
    config = GPT2Config(
        vocab_size=256,
        n_positions=CONTEXT,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).to(dtype)
