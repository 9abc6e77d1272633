"""One rank fails, dies or freezes: the others end in seconds and name it."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
from ranks import finish, finish_on_ranks, run_on_ranks, started_on_ranks
from torch.distributed import TCPStore

from loraga_dist.ranks.watch import Failure, Watch
from loraga_dist.ranks.world import World


def watch_the_others(how: str, who: int) -> None:
    """On every rank: rank `who` ends or freezes as `how` says while the rest wait for it."""
    world = World.start()
    watch = Watch(world, silent_beats=6)
    world.sum_(torch.ones(1))
    try:
        if world.rank == who:
            time.sleep(1.5)
            if how == "raise":
                raise ValueError("the first error")
            if how in ("SIGKILL", "SIGSTOP"):
                os.kill(os.getpid(), getattr(signal, how))
        world.broadcast_(torch.ones(1), who)  # a dead source fails all others at once
    except Exception as error:
        watch.fail(f"failed: {type(error).__name__}: {error}", 3, perhaps_of_another=isinstance(error, RuntimeError))
    watch.stop()


@pytest.mark.parametrize("who", [0, 2])
@pytest.mark.parametrize("how", ["raise", "SIGKILL", "SIGSTOP"])
def test_the_others_end_and_name_it(how: str, who: int) -> None:
    with started_on_ranks(watch_the_others, 3, how, who) as ranks:
        codes = [rank.wait(40) for number, rank in enumerate(ranks) if number != who]
        results = finish(ranks, 20 if how == "raise" else 0)  # a frozen one ends only when it is killed
    assert codes == [3, 3], results
    said = "".join(result.stderr for result in results)
    assert f"loraga-dist: rank {who} " in said
    if how == "raise" or who != 0:
        assert said.count("loraga-dist:") == 1 and results[0].stderr, "once, and by rank 0"
    named = {line.split()[2] for line in said.splitlines() if line.startswith("loraga-dist: rank ")}
    assert named == {str(who)}, said
    if how == "raise":
        assert "the first error" in said and results[who].code == 3
    else:
        assert results[who].code == -signal.SIGKILL


def test_ranks_that_end_well_say_nothing() -> None:
    results = finish_on_ranks(watch_the_others, 3, "well", 0)
    assert [(result.code, result.stdout, result.stderr) for result in results] == [(0, "", "")] * 3


FORGED = json.dumps({"rank": 1, "message": "\x1b[2Jforged", "exit_code": 0})


def write_what_no_rank_wrote(store: TCPStore) -> None:
    for value in (FORGED, FORGED.replace("0", "3"), "no JSON", "[" * 10**5, b"\xff\xfe".decode("latin-1"), ""):
        for key in ("failure", "said", "beat/0", "beat/1"):
            store.set(key, value)
        time.sleep(0.7)


def write_what_ranks_wrote_elsewhere(store: TCPStore) -> None:
    """Their own sealed values, under other keys."""
    for _ in range(4):
        store.set("failure", store.get("beat/1").decode())
        store.set("beat/0", store.get("beat/1").decode())
        time.sleep(0.7)


def delete_everything(store: TCPStore) -> None:
    for _ in range(4):
        for key in store.list_keys():
            store.delete_key(key)
        time.sleep(0.7)


def watch_beside_a_stranger(disturb: Callable[[TCPStore], None], who: int | None) -> str:
    """On every rank: the first connects to the watch's store as anyone can; rank `who` fails after that."""
    world = World.start()
    watch = Watch(world, silent_beats=6)
    if world.is_main:
        place = watch._place
        stranger = TCPStore(place["host"], place["port"], is_master=False, timeout=timedelta(seconds=5))
        disturb(stranger)
        readable = [stranger.get(key).decode() for key in stranger.list_keys()]
        assert place["secret"] not in " ".join([*stranger.list_keys(), *readable]), "who can read could write"
    world.barrier()
    if world.rank == who:
        watch.fail("failed: as it should", 2, perhaps_of_another=False)
    if who is not None:
        time.sleep(20)
    watch.stop()
    return "went on"


DISTURBANCES = [write_what_no_rank_wrote, write_what_ranks_wrote_elsewhere, delete_everything]


@pytest.mark.parametrize("disturb", DISTURBANCES)
def test_a_stranger_ends_no_run(disturb: Callable[[TCPStore], None]) -> None:
    assert run_on_ranks(watch_beside_a_stranger, 2, disturb, None) == ["went on"] * 2


@pytest.mark.parametrize("disturb", DISTURBANCES[:1])
def test_a_failure_is_heard_over_a_stranger(disturb: Callable[[TCPStore], None]) -> None:
    results = finish_on_ranks(watch_beside_a_stranger, 2, disturb, 1)
    assert [result.code for result in results] == [2, 2], results
    ignored, failed = results[0].stderr.splitlines()
    assert ignored.startswith("loraga-dist: what no rank has written at 127.0.0.1:")
    assert failed == "loraga-dist: rank 1 failed: as it should" and results[1].stderr == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '"text"',
        '{"rank": 1}',
        '{"rank": 1, "message": "m", "exit_code": 0}',
        '{"rank": 1, "message": "m", "exit_code": 1}',
        '{"rank": 1, "message": "m", "exit_code": "3"}',
        '{"rank": 1, "message": "m", "exit_code": [3]}',
        '{"rank": 1, "message": "m", "exit_code": true}',
        '{"rank": "1", "message": "m", "exit_code": 3}',
        '{"rank": 1, "message": ["m"], "exit_code": 3}',
        '{"rank": 1, "message": "m", "exit_code": 3, "more": 0}',
    ],
)
def test_what_is_no_failure(text: str) -> None:
    assert Failure.of_text(text) is None


def test_a_failure_reads_back() -> None:
    for code in (2, 3, 143):
        failure = Failure(1, "zwei\nZeilen", code)
        assert Failure.of_text(failure.as_text()) == failure


def where_the_watch_listens() -> int:
    world = World.start()
    watch = Watch(world)
    if world.is_main:
        with pytest.raises(ConnectionRefusedError):  # 127.0.0.2 is this machine, as another of its networks is
            socket.create_connection(("127.0.0.2", watch._place["port"]))
    world.barrier()
    watch.stop()
    world.barrier()
    return watch._place["port"]


def test_the_watch_listens_where_ranks_look_for_it() -> None:
    ports = run_on_ranks(where_the_watch_listens, 2)
    assert ports[0] == ports[1] > 0


def break_the_watch() -> None:
    """On rank 1: its watch meets what nobody foresaw."""
    world = World.start()
    watch = Watch(world)
    if world.rank == 1:
        watch._beat = None  # type: ignore[assignment,method-assign]
    time.sleep(15)


def test_a_watch_that_breaks_ends_the_run() -> None:
    results = finish_on_ranks(break_the_watch, 2)
    assert [result.code for result in results] == [3, 3], results
    assert results[0].stderr.startswith("loraga-dist: rank 1 failed to watch: TypeError: ")
