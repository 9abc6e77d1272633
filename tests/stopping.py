"""Runs that are asked to stop at one moment, as by a scheduler."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from loraga_dist.config import load_config
from loraga_dist.ranks.session import run_as_rank
from loraga_dist.ranks.stop import StopRequest
from loraga_dist.ranks.world import World
from loraga_dist.run.pipeline import run


class StopAfter(StopRequest):
    """Asked for by nobody: the request appears when it has been looked at often enough, or never (0)."""

    def __init__(self, num_looks: int) -> None:
        self._before = {}
        self._holding = threading.Lock()
        self._num_looks = num_looks
        self._looks = 0

    @property
    def signal_name(self) -> str | None:
        self._looks += 1
        return "SIGUSR1" if self._looks == self._num_looks else None


def init_until(num_looks: int, config_path: Path, overrides: Sequence[str]) -> int:
    """On every rank: `loraga-dist init`, asked to stop after so many looks; its exit code."""

    def work(world: World, _: StopRequest) -> None:
        with world.together():
            config = load_config(config_path, overrides)
        run(config, world, StopAfter(num_looks))

    return run_as_rank(work)
