"""Ranks meet at rank 0's address within a time limit, and whoever is missing is named."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from loraga_dist.errors import RunError, UserError
from loraga_dist.ranks.launcher import LaunchedRank, environment_int

RENDEZVOUS_SECONDS = 600
"""Overridden by the environment: it is needed before any configuration is read."""


def meet(launched: LaunchedRank) -> Store:
    """The store through which process groups connect, once every rank has reached it.

    Raises UserError when the address is no address, the port is taken, or ranks disagree on their number; RunError when
    not all ranks arrive within LORAGA_RENDEZVOUS_SECONDS.
    """
    seconds = environment_int(os.environ, "LORAGA_RENDEZVOUS_SECONDS", RENDEZVOUS_SECONDS)
    deadline = time.monotonic() + seconds
    where = f"{launched.master_addr}:{launched.master_port}"
    # torchrun's store outlives the ranks that it starts again
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"loraga_dist/{attempt}", _reach(launched, where, seconds))
    keys = [f"arrived/{rank}" for rank in range(launched.size)]
    try:
        store.set(keys[launched.rank], f"{launched.size} {socket.gethostname()}")
        with suppress(dist.DistStoreError):  # who is missing is seen below
            store.wait(keys, timedelta(seconds=max(1.0, deadline - time.monotonic())))
        if missing := [rank for rank, key in enumerate(keys) if not store.check([key])]:
            raise RunError(
                f"rendezvous at {where}: {launched.size - len(missing)} of {launched.size} ranks arrived within "
                f"{seconds} s, not {missing}; check that they run and that their nodes reach this address and port"
            )
        for rank, key in enumerate(keys):
            size, _, host = store.get(key).decode().partition(" ")
            if int(size) != launched.size:
                raise UserError(
                    "WORLD_SIZE",
                    launched.size,
                    f"is {size} for rank {rank} on {host}; start all ranks by one launcher, with the same settings",
                )
    except dist.DistError as error:
        raise RunError(f"rendezvous at {where}: rank 0 has left it; its own message says why") from error
    return store


def _reach(launched: LaunchedRank, where: str, seconds: int) -> Store:
    here = f"rank {launched.rank} on {socket.gethostname()}"
    try:
        socket.getaddrinfo(launched.master_addr, launched.master_port)
    except OSError as error:
        raise UserError(
            "MASTER_ADDR", launched.master_addr, f"{here}: {error.strerror}; set it to an address of rank 0's node"
        ) from error
    # torchrun's agent holds the store for its ranks
    is_server = launched.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            launched.master_addr,
            launched.master_port,
            is_master=is_server,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except dist.DistError as error:
        if is_server:
            raise UserError(
                "MASTER_PORT", launched.master_port, f"cannot be opened by {here}; set it to a free port"
            ) from error
        raise RunError(
            f"rendezvous at {where}: {here} found nobody there within {seconds} s; check that rank 0 runs and that "
            "this node reaches that address and port"
        ) from error
