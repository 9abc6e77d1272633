"""What ranks tell each other: two real ranks, and one that is alone."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from ranks import finish_on_ranks, run_on_ranks

from loraga_dist.errors import LoragaError, RunError, UserError
from loraga_dist.ranks.world import World
from loraga_dist.sharding.zero3 import name_local_rank

TEXTS = ["", "zweite Zeile\nüber ∂W, \0 and 日本"]
VALUES = [{"a": [1, 2.5, None], "b": {"c": True}}, [0.1 + 0.2, "x"]]


def collectives() -> dict[str, Any]:
    world = World.start()
    mine = torch.tensor([1.0 + world.rank, 10.0 - world.rank])
    at_owner = mine.clone()
    world.reduce_(at_owner, 1)
    world.barrier()
    return {
        "place": (world.rank, world.size, world.is_main, world.ranks_on_node),
        "again": World.start() == world == World.current(),
        "sum": world.sum_(mine.clone()).tolist(),
        "max": world.max_(mine.clone()).tolist(),
        "reduced": at_owner.tolist(),
        "broadcast": world.broadcast_(mine.clone(), 1).tolist(),
        "texts": world.all_texts(TEXTS[world.rank]),
        "json": world.all_json(VALUES[world.rank]),
        "of_main": world.of_main((TEXTS[1], VALUES) if world.is_main else object()),
    }


def test_collectives() -> None:
    told = run_on_ranks(collectives, 2)
    assert [rank["place"] for rank in told] == [(0, 2, True, 2), (1, 2, False, 2)]
    for rank in told:
        assert rank["again"]
        assert rank["sum"] == [3.0, 19.0] and rank["max"] == [2.0, 10.0] and rank["broadcast"] == [2.0, 9.0]
        assert rank["texts"] == TEXTS and rank["json"] == VALUES
        assert rank["of_main"] == [TEXTS[1], VALUES]
    assert told[1]["reduced"] == [3.0, 19.0]


def test_alone_every_collective_is_the_identity() -> None:
    world = World.alone()
    ours = torch.tensor([1.0, 2.0])
    world.reduce_(ours, 0)
    world.barrier()
    for tensor in (world.sum_(ours), world.max_(ours), world.broadcast_(ours, 0)):
        assert tensor.tolist() == [1.0, 2.0]
    assert world.all_texts("text") == ["text"] and world.all_json({"a": (1, 2)}) == [{"a": [1, 2]}]
    assert world.of_main({"a": (1, None)}) == {"a": [1, None]}
    world.require_same({"a": 1}, "install the same")


def met(error: LoragaError) -> tuple[str, str, int, bool]:
    return type(error).__name__, str(error), error.exit_code, error.on_all_ranks


def compare(facts_of_ranks: list[dict[str, Any]]) -> tuple[str, str, int, bool] | None:
    world = World.start()
    try:
        world.require_same(facts_of_ranks[world.rank], "install the same")
    except UserError as error:
        return met(error)
    return None


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ([{"a": {"b": [1, 2]}, "c": None}] * 2, None),
        ([{"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}], "a.c: 2: is 3 on ranks [1]; install the same"),
        ([{"torch": "2.13"}, {"torch": "2.13", "trl": "1"}], "trl: None: is '1' on ranks [1]; install the same"),
    ],
)
def test_ranks_that_differ_all_know_in_what(facts: list[dict[str, Any]], said: str | None) -> None:
    assert run_on_ranks(compare, 2, facts) == [said and ("UserError", said, 2, True)] * 2


def leave_a_section(errors_of_ranks: list[Exception | None]) -> tuple[str, str, int, bool] | None:
    world = World.start()
    try:
        with world.together():
            error = errors_of_ranks[world.rank]
            if error is not None:
                raise error
    except LoragaError as error:
        return met(error)
    return None


def test_all_leave_a_section_together() -> None:
    assert run_on_ranks(leave_a_section, 2, [None, None]) == [None, None]


def test_the_error_of_one_rank_is_everyones() -> None:
    told = run_on_ranks(leave_a_section, 2, [None, RunError("the disk is full")])
    assert told == [(kind, "the disk is full", 3, True) for kind in ("PeerError", "RunError")]


def test_of_two_errors_the_first_ranks_counts() -> None:
    told = run_on_ranks(leave_a_section, 2, [RunError("first"), RunError("second")])
    assert told == [(kind, "first", 3, True) for kind in ("RunError", "PeerError")]


@pytest.mark.parametrize("debug", ["0", "1"])
def test_an_error_that_is_not_ours_is_a_failed_run_and_shown_where_it_was(debug: str) -> None:
    results = finish_on_ranks(leave_a_section, 2, [None, ValueError("what?")], env={"LORAGA_DEBUG": debug})
    hint = "" if debug == "1" else " (LORAGA_DEBUG=1 prints the traceback)"
    line = f"rank 1: ValueError: what?{hint}"
    assert [result.value for result in results] == [(kind, line, 3, True) for kind in ("PeerError", "RunError")]
    assert ["Traceback" in result.stderr for result in results] == [False, debug == "1"]


def test_deepspeed_takes_the_only_gpu_that_a_rank_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"]
    for name in names:
        monkeypatch.setenv(name, "1")
    name_local_rank(torch.device("cpu"))
    assert [os.environ[name] for name in names] == ["1", "1"]
    name_local_rank(torch.device("cuda", 0))
    assert [os.environ[name] for name in names] == ["0", "0"]
