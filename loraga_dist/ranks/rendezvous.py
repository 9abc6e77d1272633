"""Ranks meet at rank 0's address within a time limit, and whoever is missing is named."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from loraga_dist.errors import RunError, UserError
from loraga_dist.ranks.launcher import LaunchedRank, environment_int

RENDEZVOUS_SECONDS = 600
"""Overridden by the environment: it is needed before any configuration is read."""
_MAX_RENDEZVOUS_SECONDS = 10**7

_MARGIN_SECONDS = 5
"""After its limit, for the meeting to say itself who is missing."""

T = TypeVar("T")


def meet(launched: LaunchedRank, device_type: str) -> Store:
    """The store through which process groups connect, once every rank has reached it.

    Raises UserError when the address is no address, the port is taken, or ranks disagree on their number or compute on
    devices of another type, whose groups would wait for each other; RunError when not all ranks arrive within
    LORAGA_RENDEZVOUS_SECONDS.
    """
    seconds = rendezvous_seconds()
    where = f"{launched.master_addr}:{launched.master_port}"

    def late() -> str:
        if not _is_heard(launched):  # torch's client tries once more when its time is over
            return _nobody(launched, where, seconds)
        return (
            f"rendezvous at {where}: {_here(launched)} reached something that gave no answer within {seconds} s; see "
            "that MASTER_ADDR and MASTER_PORT are rank 0's, and that nothing else listens there"
        )

    return within(seconds + _MARGIN_SECONDS, lambda: _meet(launched, device_type, where, seconds), late)


def rendezvous_seconds() -> int:
    name = "LORAGA_RENDEZVOUS_SECONDS"
    return environment_int(os.environ, name, RENDEZVOUS_SECONDS, least=1, most=_MAX_RENDEZVOUS_SECONDS)


def within(seconds: float, work: Callable[[], T], late: Callable[[], str]) -> T:
    """What `work` returns or raises; RunError, of what `late` says, when it takes longer.

    It runs in a thread of its own, which is left to itself then: what waits in C++ cannot be called off.
    """
    answer = begun(work)
    if not futures.wait([answer], timeout=seconds).done:
        raise RunError(late())
    return answer.result()


def begun(work: Callable[[], T]) -> futures.Future[T]:
    """What `work` will return or raise, from a thread that the end of the process does not wait for."""
    answer: futures.Future[T] = futures.Future()

    def answer_or_raise() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=answer_or_raise, name="begun", daemon=True).start()
    return answer


def addresses_of(host: str) -> list[str]:
    """The numeric addresses that this node finds a host at. Raises OSError or UnicodeError when there are none."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]


class Listening(NamedTuple):
    """A socket that listens at one address alone."""

    address: str
    port: int
    descriptor: int


def listen(addresses: Sequence[str], port: int) -> Listening | None:
    """Listen at the first of the addresses that is this node's; port 0 stands for any that is free.

    None where none is: it may be a router's, which sends it on to this node. Raises OSError when the port is taken.
    """
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            server = socket.create_server((address, port), family=family)
            return Listening(address, server.getsockname()[1], server.detach())
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    return None


def _meet(launched: LaunchedRank, device_type: str, where: str, seconds: int) -> Store:
    deadline = time.monotonic() + seconds
    # torchrun's store outlives the ranks that it starts again
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"loraga_dist/{attempt}", _reach(launched, where, seconds))
    keys = [f"arrived/{rank}" for rank in range(launched.size)]
    try:
        store.set(keys[launched.rank], f"{launched.size} {device_type} {socket.gethostname()}")
        with suppress(dist.DistStoreError):  # who is missing is seen below
            store.wait(keys, timedelta(seconds=max(1.0, deadline - time.monotonic())))
        if missing := [rank for rank, key in enumerate(keys) if not store.check([key])]:
            raise RunError(
                f"rendezvous at {where}: {launched.size - len(missing)} of {launched.size} ranks arrived within "
                f"{seconds} s, not {missing}; check that they run and that their nodes reach this address and port"
            )
        for rank, key in enumerate(keys):
            size, their_type, host = store.get(key).decode().split(" ", 2)
            if int(size) != launched.size:
                raise UserError(
                    "WORLD_SIZE",
                    launched.size,
                    f"is {size} for rank {rank} on {host}; start all ranks by one launcher, with the same settings",
                )
            if their_type != device_type:
                problem = f"has {_here(launched)} compute on {device_type} and rank {rank} on {host} on {their_type}"
                remedy = "see what nvidia-smi says on both; give every rank a GPU, or none"
                raise UserError("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"), f"{problem}; {remedy}")
    except dist.DistError as error:
        raise RunError(f"rendezvous at {where}: rank 0 has left it; its own message says why") from error
    return store


def _here(launched: LaunchedRank) -> str:
    return f"rank {launched.rank} on {socket.gethostname()}"


def _reach(launched: LaunchedRank, where: str, seconds: int) -> Store:
    here = _here(launched)
    try:
        addresses = addresses_of(launched.master_addr)
    except (OSError, UnicodeError) as error:
        problem = f"{here}: {getattr(error, 'strerror', None) or error}; set it to an address of rank 0's node"
        raise UserError("MASTER_ADDR", launched.master_addr, problem) from error
    # torchrun's agent holds the store for its ranks
    is_server = launched.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        found = listen(addresses, launched.master_port) if is_server and not _is_own_name(launched, addresses) else None
        return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            launched.master_addr,
            launched.master_port,
            is_master=is_server,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=found.descriptor if found else None,
        )
    except (dist.DistError, OSError) as error:
        if is_server:
            raise UserError(
                "MASTER_PORT", launched.master_port, f"cannot be opened by {here}; set it to a free port"
            ) from error
        raise RunError(_nobody(launched, where, seconds)) from error


def _nobody(launched: LaunchedRank, where: str, seconds: int) -> str:
    return (
        f"rendezvous at {where}: {_here(launched)} found nobody there within {seconds} s; check that rank 0 runs and "
        "that this node reaches that address and port"
    )


def _is_heard(launched: LaunchedRank) -> bool:
    try:
        socket.create_connection((launched.master_addr, launched.master_port), timeout=1).close()
    except (OSError, UnicodeError):
        return False
    return True


def _is_own_name(launched: LaunchedRank, addresses: Sequence[str]) -> bool:
    """Whether ranks on other nodes find this node elsewhere: its own name often leads to 127.0.1.1, there alone."""
    if launched.master_addr in ("localhost", *addresses) or launched.local_size == launched.size:
        return False
    return any(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)
