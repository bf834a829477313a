"""Compares what ranks hold before they sum together, so that a difference is an error and not an endless wait.

The ranks compare once for each optimizer and its parameters, or each list of tensors. They use the store of
``init_process_group``, and no collective: a collective would hang if a rank did not come, while the store tells who is
missing.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import torch.distributed as dist

# The time, in seconds, that a rank waits for the others to come to the same first step.
TIME_LIMIT = 300.0
# The time, in seconds, after which a rank looks whether the ranks it waits for wait for it.
_PATIENCE = 2.0
_PREFIX = "steadygrad/meshes"
_WITHDRAWN = "withdrawn"


class _Agreements:
    """Holds what this process has agreed on under one ``init_process_group``."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.reached: dict[tuple[tuple[int, ...], str], list[list[int]]] = {}
        self.asked: dict[tuple[int, ...], int] = {}
        self.questions = 0
        # Waits of other ranks that this rank has already refused to join; each is an error once only.
        self.refused: set[tuple[int, int]] = set()


_agreements: _Agreements | None = None


def agreed_meshes(
    function: str,
    ranks: tuple[int, ...],
    meshes: list[list[int]],
    tensors: list[str],
    settings: list[str],
    anew: bool,
) -> list[list[int]]:
    """Returns the meshes as the first of ``ranks`` lists them, once all ranks came with the same tensors and settings.

    Args:
        function: The function's name, with which messages start.
        ranks: The ranks of all the meshes, ascending; this rank is one of them.
        meshes: The ranks of each mesh, in the order in which the tensors use them.
        tensors: A line on each tensor, which is the same on all ranks.
        settings: A line on each option that has to be the same on all ranks.
        anew: Whether to ask even if all ranks have agreed on the same before. It is the same on all ranks.

    Raises:
        RuntimeError: Another rank holds other tensors or meshes, has other settings, or did not come within
            ``TIME_LIMIT`` seconds.
    """
    global _agreements
    store = dist.distributed_c10d._get_default_store()
    if _agreements is None or _agreements.store is not store:
        _agreements = _Agreements(store)
    known = _agreements
    digest = f"{_digest([len(meshes), *tensors])} {_digest(settings)}"
    if anew or (ranks, digest) not in known.reached:
        known.reached[ranks, digest] = _ask(
            known, function, ranks, digest, meshes, tensors, settings
        )
    return known.reached[ranks, digest]


def _digest(lines: list[Any]) -> str:
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _ask(
    known: _Agreements,
    function: str,
    ranks: tuple[int, ...],
    digest: str,
    meshes: list[list[int]],
    tensors: list[str],
    settings: list[str],
) -> list[list[int]]:
    store, rank = known.store, dist.get_rank()
    turn = known.asked.get(ranks, 0)
    base = f"{_PREFIX}/{hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]}/{turn}"
    if rank == ranks[0]:
        store.set(f"{base}/first", json.dumps([meshes, tensors, settings]))
    store.set(f"{base}/{rank}", digest)
    store.set(f"{_PREFIX}/waits/{rank}", json.dumps([list(ranks), turn, known.questions]))
    known.questions += 1
    try:
        _wait(known, function, ranks, base)
    except RuntimeError:
        store.set(f"{base}/{rank}", _WITHDRAWN)  # not an answer to the next question
        raise
    # If the others did not come, this line is not reached, and the next question has the same number.
    known.asked[ranks] = turn + 1
    store.set(f"{_PREFIX}/waits/{rank}", "null")
    digests = {other: _read(store, f"{base}/{other}").split() for other in ranks}
    first_meshes, first_tensors, first_settings = json.loads(_read(store, f"{base}/first"))
    strangers = _others(digests, ranks, part=0)
    if strangers:
        theirs = _difference(tensors, first_tensors)
        told = f"; here {theirs} on rank {ranks[0]}" if rank in strangers else ""
        raise RuntimeError(
            f"{function}: parameters: expected the same ones, in the same order and on the same meshes, on ranks "
            f"{list(ranks)}, got different ones on ranks {strangers} than on rank {ranks[0]}{told}. Give every rank "
            "the same param groups"
        )
    strangers = _others(digests, ranks, part=1)
    if strangers:
        pairs = zip(settings, first_settings, strict=False)
        theirs = next((f"{a}, but {b}" for a, b in pairs if a != b), "there are more or fewer")
        told = f"; here {theirs} on rank {ranks[0]}" if rank in strangers else ""
        raise RuntimeError(
            f"{function}: options: expected the same ones on ranks {list(ranks)}, which step together, got different "
            f"ones on ranks {strangers} than on rank {ranks[0]}{told}"
        )
    found: list[list[int]] = first_meshes
    return found


def _others(digests: dict[int, list[str]], ranks: tuple[int, ...], part: int) -> list[int]:
    first = digests[ranks[0]][part]
    return [rank for rank in ranks if digests[rank][part] != first]


def _difference(own: list[str], first: list[str]) -> str:
    for index, (mine, other) in enumerate(zip(own, first, strict=False)):
        if mine != other:
            return f"parameters[{index}] is {mine}, but {other}"
    return f"there are {len(own)} parameters, but {len(first)}"


def _read(store: Any, key: str) -> str:
    value: Any = store.get(key)
    return value.decode() if isinstance(value, bytes) else str(value)


def _wait(known: _Agreements, function: str, ranks: tuple[int, ...], base: str) -> None:
    begin = time.monotonic()
    looked = begin
    pause = 0.001
    while absent := _absent(known.store, ranks, base):
        now = time.monotonic()
        if now - looked > _PATIENCE or now - begin > TIME_LIMIT:
            looked = now
            for other in absent:
                _refuse_crossed_waits(known, function, ranks, other)
            if now - begin > TIME_LIMIT:
                raise RuntimeError(
                    f"{function}: parameters: expected all of ranks {list(ranks)}, which share meshes, to take the "
                    f"same first step, got none of ranks {absent} within {TIME_LIMIT:g} seconds. Every rank of "
                    "a mesh has to take the step, even without gradients"
                )
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def _absent(store: Any, ranks: tuple[int, ...], base: str) -> list[int]:
    keys = [f"{base}/{rank}" for rank in ranks]
    if store.check([*keys, f"{base}/first"]):
        return [r for r, key in zip(ranks, keys, strict=True) if _read(store, key) == _WITHDRAWN]
    return [r for r, key in zip(ranks, keys, strict=True) if not store.check([key])] or [ranks[0]]


def _refuse_crossed_waits(
    known: _Agreements, function: str, ranks: tuple[int, ...], other: int
) -> None:
    key = f"{_PREFIX}/waits/{other}"
    waits = json.loads(_read(known.store, key)) if known.store.check([key]) else None
    if waits is None:
        return
    others = tuple(waits[0])
    met = known.asked.get(others, 0) > waits[1] or (other, waits[2]) in known.refused
    if others != ranks and dist.get_rank() in others and not met:
        known.refused.add((other, waits[2]))
        raise RuntimeError(
            f"{function}: parameters: expected meshes over the same ranks on each rank, got ranks {list(ranks)} here "
            f"and ranks {list(others)} on rank {other}. Give every rank the same param groups: if a mesh spans more "
            "ranks than another, every rank has to hold the DTensors of both, even the empty ones"
        )
