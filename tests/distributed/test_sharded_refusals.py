"""Ranks that do not fit together get an error, on every rank, and none of them waits."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.sharded_refusals import OTHER_OPTIONS
from tests.distributed.test_sharded import found as found_by_name
from tests.distributed.test_sharded import pytestmark as pytestmark
from tests.distributed.test_sharded_situations import world as world
from tests.ranks import Found


def refusals(world: int, name: str) -> Found:
    return found_by_name(world, name)


def assert_refused(result: dict[str, Any], kind: str, *words: str) -> None:
    assert result["raised"][0] == kind
    for word in words:
        assert word in result["raised"][1]
    assert result["unchanged"]
    assert result["seconds"] < 15


def test_destroyed_groups_are_named(world: int) -> None:
    for rank in refusals(world, "destroyed_groups"):
        assert_refused(rank["option"], "RuntimeError", "step: reduce_norm: expected an initialized")
        assert rank["step"][0] == rank["function"][0] == "RuntimeError"
        assert "step: process group: expected an initialized group, got one" in rank["step"][1]
        assert "clip_grad_norm_: process group: expected an init" in rank["function"][1]
        assert rank["unchanged"]


def test_wrong_arguments(world: int) -> None:
    for number, rank in enumerate(refusals(world, "wrong_arguments")):
        assert_refused(rank["name"], "TypeError", "reduce_norm: expected", "got str")
        assert_refused(rank["count"], "ValueError", "one entry per param group, 1, got 2")
        assert_refused(rank["partial"], "TypeError", "sharded or replicated, got", "Partial")
        if world == 4:
            assert_refused(rank["mesh"], "ValueError", "of one dimension", "got one of 2")
        if number != 0:
            assert_refused(rank["stranger"], "RuntimeError", "that this rank is a member of")


def test_other_parameters_on_one_rank_are_an_error_on_all(world: int) -> None:
    last = world - 1
    for number, rank in enumerate(refusals(world, "other_tensors")):
        words = (f"got different ones on ranks [{last}] than on rank 0", "Give every rank the same")
        assert_refused(rank["shape"], "RuntimeError", *words)
        assert_refused(rank["count"], "RuntimeError", *words)
        assert words[0] in rank["function"][1]
        if number == last:
            assert "parameters[0] is a (8, 2) DTensor" in rank["shape"]["raised"][1]
            assert "there are 2 parameters, but 1 on rank 0" in rank["count"]["raised"][1]


def test_other_meshes_on_one_rank_are_an_error_on_all() -> None:
    reaches = ([0, 1], [0, 1, 2, 3], [0, 1, 2, 3], [2, 3])
    for here, rank in zip(reaches, refusals(4, "other_meshes"), strict=True):
        assert_refused(rank, "RuntimeError", "meshes over the same ranks on each", f"{here} here")


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever(world: int) -> None:
    ranks = refusals(world, "a_rank_that_does_not_come")
    for rank in ranks[:-1]:
        assert_refused(rank, "RuntimeError", "step: parameters: expected")
    assert f"got none of ranks [{world - 1}] within 2 seconds" in ranks[0]["raised"][1]
    assert ranks[-1]["raised"] == ("", "")


def test_other_param_groups_on_one_rank_are_an_error_on_all(world: int) -> None:
    last = world - 1
    for number, rank in enumerate(refusals(world, "other_groups")):
        words = (
            "step: parameters: expected",
            f"got different ones on ranks [{last}] than on rank 0",
        )
        for result in rank.values():
            assert_refused(result, "RuntimeError", *words)
        if number == last:
            told = "parameters[1] is a (8, 2) DTensor of group 0"
            assert told in rank["split"]["raised"][1]
            assert world == 2 or "of shape (2, 2)" in rank["mesh"]["raised"][1]


@pytest.mark.parametrize("option", OTHER_OPTIONS)
def test_other_options_on_one_rank_are_an_error_on_all(world: int, option: str) -> None:
    last = world - 1
    for number, rank in enumerate(refusals(world, "other_options")):
        words = (
            "step: options: expected the same",
            f"got different ones on ranks [{last}] than on rank 0",
        )
        assert_refused(rank[option], "RuntimeError", *words)
        if number == last:
            assert f"; here {option} " in rank[option]["raised"][1]
            assert rank[option]["raised"][1].endswith(" on rank 0")


@pytest.mark.parametrize("option", ["clip_scope", "reduce_norm"])
def test_other_options_of_stages_are_an_error_on_all(world: int, option: str) -> None:
    for number, rank in enumerate(refusals(world, "other_options")):
        result = rank[f"stages: {option}"]
        assert_refused(result, "RuntimeError", "step: options: expected the same ones on ranks")
        assert number != world - 1 or f"; here {option} " in result["raised"][1]


def test_master_copies_of_float64_are_refused_everywhere(world: int) -> None:
    for rank in refusals(world, "master_of_double"):
        for name in ("sharded", "plain"):
            words = ("step: parameters[1]: expected float32, bfloat16 or float16", "got float64")
            assert_refused(rank[name], "ValueError", *words)
        assert rank["norm"] == pytest.approx(8**0.5)
