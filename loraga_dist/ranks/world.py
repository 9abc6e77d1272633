"""One process group over the ranks the launcher started, and the few collectives the pipeline needs."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from loraga_dist.errors import LoragaError, RunError, UserError, unforeseen
from loraga_dist.ranks.launcher import LaunchedRank, environment_int, find_launched_rank, local_size
from loraga_dist.ranks.rendezvous import meet, rendezvous_seconds, within

COLLECTIVE_TIMEOUT = timedelta(minutes=30)

_MIN_CONNECT_SECONDS = 60


class PeerError(LoragaError):
    """Another rank failed; carries its message and exit code, so that all ranks end alike."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class World:
    """This process among all ranks. With size 1 every collective is the identity."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @classmethod
    def start(cls) -> World:
        """Join the process group the launcher describes.

        Raises UserError when its variables do not fit together, RunError when the ranks do not find each other.
        """
        if dist.is_initialized():
            return cls.current()
        launched = find_launched_rank(os.environ)
        device = _device(launched.local_rank)
        if launched.size > 1:
            os.environ.update(launched.variables())
            _share_cores(launched)
            if device.type == "cuda":
                torch.cuda.set_device(device)
            # its functions take the group that exists at its import as default arguments, and so keep gloo's threads
            # alive past `stop`: a rank then aborts at exit now and then
            importlib.import_module("torch.distributed.nn.functional")
            _connect(launched, "nccl" if device.type == "cuda" else "gloo")
        return cls(launched.rank, launched.size, launched.local_rank, device)

    @classmethod
    def current(cls) -> World:
        """The process group as it stands, for callers that run inside somebody's training script."""
        local_rank = environment_int(os.environ, "LOCAL_RANK", 0)
        if not dist.is_initialized():
            return cls(0, 1, local_rank, _device(local_rank))
        return cls(dist.get_rank(), dist.get_world_size(), local_rank, _device(local_rank))

    @classmethod
    def alone(cls) -> World:
        """A single process on the CPU, whatever its environment says."""
        return cls(0, 1, 0, torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def ranks_on_node(self) -> int:
        """As the launcher says; 1 where it says nothing."""
        return local_size(os.environ)

    @property
    def device_name(self) -> str:
        return "CPU" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)

    def stop(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        # an all-reduce works alike under gloo and nccl, of which the latter leaves the host to go on without its result
        self.sum_(torch.zeros(1, device=self.device)).item()

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Maximum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def reduce_(self, tensor: torch.Tensor, owner: int) -> None:
        """Sum over ranks into `owner`'s tensor; other ranks' tensors hold nothing meaningful afterwards."""
        if self.size > 1:
            dist.reduce(tensor, dst=owner)

    def broadcast_(self, tensor: torch.Tensor, owner: int) -> torch.Tensor:
        if self.size > 1:
            dist.broadcast(tensor, src=owner)
        return tensor

    def all_texts(self, text: str) -> list[str]:
        """Every rank's text, in rank order. Plain bytes travel, never a pickle."""
        if self.size == 1:
            return [text]
        data = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8).to(self.device)
        lengths = [torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)], device=self.device))
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: len(data)] = data
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        lengths_of_parts = zip(parts, lengths, strict=True)
        return [part[: int(length) - 1].cpu().numpy().tobytes().decode() for part, length in lengths_of_parts]

    def all_json(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, as JSON gives it back: tuples have become lists."""
        return [json.loads(text) for text in self.all_texts(json.dumps(value))]

    def of_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank, as JSON gives it back; what the others pass is ignored."""
        content = bytearray(json.dumps(value).encode()) if self.is_main else bytearray()
        length = self.broadcast_(torch.tensor([len(content)], device=self.device), 0)
        if self.is_main:
            data = torch.frombuffer(content, dtype=torch.uint8).to(self.device)
        else:
            data = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        return json.loads(self.broadcast_(data, 0).cpu().numpy().tobytes())

    def require_same(self, facts: Mapping[str, object], remedy: str) -> None:
        """Raise UserError on all ranks unless each of them has the same facts; a collective. Names those that differ.

        facts: what JSON can hold, nested or not.
        """
        of_ranks = [dict(dotted(tree)) for tree in self.all_json(facts)]
        ours = of_ranks[0]
        for key in sorted(set().union(*of_ranks)):
            others = [rank for rank, theirs in enumerate(of_ranks) if theirs.get(key) != ours.get(key)]
            if others:
                problem = f"is {of_ranks[others[0]].get(key)!r} on ranks {others}; {remedy}"
                error = UserError(key, ours.get(key), problem)
                error.on_all_ranks = True
                raise error

    @contextmanager
    def together(self) -> Iterator[None]:
        """A section without collectives in which ranks may fail one by one: all leave it, or all raise the first error.

        An error that is not ours is reported as a failed run, with the rank that met it.
        """
        error: LoragaError | None = None
        try:
            yield
        except LoragaError as caught:
            error = caught
        except Exception as caught:
            error = RunError(f"rank {self.rank}: {unforeseen(caught)}")
        reports = self.all_texts(f"{error.exit_code} {error}" if error else "")
        failed = [rank for rank, report in enumerate(reports) if report]
        if not failed:
            return
        if failed[0] != self.rank:
            code, _, message = reports[failed[0]].partition(" ")
            error = PeerError(message, int(code))
        assert error is not None
        error.on_all_ranks = True
        raise error


def dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every leaf; an empty mapping is one."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _connect(launched: LaunchedRank, backend: str) -> None:
    store = meet(launched, _device(launched.local_rank).type)
    store.set_timeout(COLLECTIVE_TIMEOUT)
    # what a rank that has left since then would be waited for
    seconds = max(_MIN_CONNECT_SECONDS, rendezvous_seconds())
    met = f"rank {launched.rank}: all ranks met at {launched.master_addr}:{launched.master_port}, but {backend}"
    remedy = f"set {backend.upper()}_SOCKET_IFNAME to the network interface between the nodes"
    try:
        within(
            seconds,
            lambda: dist.init_process_group(
                backend, store=store, rank=launched.rank, world_size=launched.size, timeout=COLLECTIVE_TIMEOUT
            ),
            lambda: f"{met} has not connected them after {seconds} s; see whether one of them has ended, or {remedy}",
        )
    except RuntimeError as error:
        raise RunError(f"{met} does not connect them; {remedy} ({str(error).splitlines()[0]})") from error


def _share_cores(launched: LaunchedRank) -> None:
    """Give each rank of a node its part of the cores: ranks that all use all of them slow each other down tenfold."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = len(os.sched_getaffinity(0))
    threads = cores // launched.local_size
    if launched.launcher == "slurm":  # where SLURM binds tasks to cores, those it shows are this rank's alone
        threads = min(cores, environment_int(os.environ, "SLURM_CPUS_PER_TASK", threads))
    torch.set_num_threads(max(1, threads))


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())
