"""Ranks that meet, and those that do not: real stores, one thread per rank."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from launching import free_port
from torch.distributed import TCPStore

from loraga_dist.errors import RunError, UserError
from loraga_dist.ranks import rendezvous
from loraga_dist.ranks.launcher import LaunchedRank
from loraga_dist.ranks.rendezvous import _is_own_name, listen, meet


def place(rank: int, size: int, port: int, address: str = "127.0.0.1") -> LaunchedRank:
    return LaunchedRank(rank, size, rank, size, address, port, "test")


@pytest.fixture(autouse=True)
def three_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAGA_RENDEZVOUS_SECONDS", "3")


def test_all_meet() -> None:
    port = free_port()
    with ThreadPoolExecutor(3) as ranks:
        stores = list(ranks.map(lambda rank: meet(place(rank, 3, port), "cpu"), (2, 0, 1)))
    stores[0].set("from", "rank 2")
    assert stores[1].get("from") == b"rank 2"


def test_ranks_started_again_meet_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torchrun, whose store is the agent's and stays."""
    port = free_port()
    agent = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with ThreadPoolExecutor(2) as ranks:
        stores = list(ranks.map(lambda rank: meet(place(rank, 2, port), "cpu"), (0, 1)))
    stores[0].set("address", "of the first attempt")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(RunError, match=r"1 of 2 ranks arrived within 3 s, not \[1\]"):
        meet(place(0, 2, port), "cpu")
    store = meet(place(1, 2, port), "cpu")
    assert not store.check(["address"])
    del agent


def test_who_is_missing_is_named() -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as ranks:
        waiting = [ranks.submit(meet, place(rank, 4, port), "cpu") for rank in (0, 2)]
    with pytest.raises(RunError, match=rf"127.0.0.1:{port}: 2 of 4 ranks arrived within 3 s, not \[1, 3\]"):
        waiting[0].result()
    with pytest.raises(RunError, match=f"127.0.0.1:{port}"):
        waiting[1].result()


def test_rank_0_is_missing() -> None:
    port = free_port()
    with pytest.raises(RunError, match=rf"127.0.0.1:{port}: rank 1 on .* found nobody there within 3 s"):
        meet(place(1, 2, port), "cpu")


def test_rank_0_is_missing_while_torch_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_MARGIN_SECONDS", -2)
    test_rank_0_is_missing()


def test_another_number_of_ranks_is_refused() -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as ranks:
        waiting = [ranks.submit(meet, place(0, 2, port), "cpu"), ranks.submit(meet, place(1, 3, port), "cpu")]
    with pytest.raises(UserError, match="WORLD_SIZE: 2: is 3 for rank 1"):
        waiting[0].result()
    with pytest.raises((UserError, RunError)):
        waiting[1].result()


def test_a_rank_that_sees_no_gpu_is_named_at_once() -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as ranks:
        waiting = [ranks.submit(meet, place(0, 2, port), "cuda"), ranks.submit(meet, place(1, 2, port), "cpu")]
    with pytest.raises(UserError, match=r"rank 0 on \S+ compute on cuda and rank 1 on \S+ on cpu; see what nvidia-smi"):
        waiting[0].result()
    with pytest.raises((UserError, RunError)):
        waiting[1].result()


def test_taken_port() -> None:
    with socket.create_server(("", 0)) as other, pytest.raises(UserError, match="set it to a free port"):
        meet(place(0, 2, other.getsockname()[1]), "cpu")


@pytest.mark.parametrize("address", ["no-such-node.invalid", "a" * 300, "a..b", "10.0.0.256.1", "\x1b[2J", " "])
def test_unknown_address(address: str) -> None:
    with pytest.raises(UserError, match="rank 1 on") as refused:
        meet(place(1, 2, 1234, address), "cpu")
    assert refused.value.key == "MASTER_ADDR"


def test_a_port_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraga_dist.ranks.rendezvous._MARGIN_SECONDS", 0)
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(RunError, match="gave no answer within 3 s"):
        meet(place(1, 2, mute.getsockname()[1]), "cpu")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("seconds", ["0", "-5", "soon", "9" * 30])
def test_a_limit_that_is_none(monkeypatch: pytest.MonkeyPatch, seconds: str) -> None:
    monkeypatch.setenv("LORAGA_RENDEZVOUS_SECONDS", seconds)
    with pytest.raises(UserError, match="LORAGA_RENDEZVOUS_SECONDS"):
        meet(place(0, 2, 1234), "cpu")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_rank_0_listens_where_it_is_looked_for(host: str) -> None:
    """Linux leads all of 127.0.0.0/8 to this machine: 127.0.0.2 stands for its other networks."""
    port = free_port()
    with ThreadPoolExecutor(2) as ranks:
        stores = list(ranks.map(lambda rank: meet(place(rank, 2, port, host), "cpu"), (0, 1)))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))
    del stores


def test_a_name_that_other_nodes_find_elsewhere() -> None:
    assert _is_own_name(LaunchedRank(0, 4, 0, 2, "node0", 1, "test"), ["127.0.1.1"])
    assert not _is_own_name(LaunchedRank(0, 4, 0, 2, "node0", 1, "test"), ["10.0.0.1"])
    assert not _is_own_name(LaunchedRank(0, 4, 0, 4, "node0", 1, "test"), ["127.0.1.1"])
    assert not _is_own_name(LaunchedRank(0, 4, 0, 2, "127.0.0.1", 1, "test"), ["127.0.0.1"])


def test_an_address_of_another_machine_is_not_listened_at() -> None:
    assert listen(["192.0.2.1"], 0) is None
    found = listen(["192.0.2.1", "127.0.0.1"], 0)
    assert found is not None and found.address == "127.0.0.1"
    os.close(found.descriptor)
