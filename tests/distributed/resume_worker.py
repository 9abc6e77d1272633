"""Each rank: `loraga-dist init`, asked to stop after so many looks at the request (0: never), as by a scheduler."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from loraga_dist.config import load_config
from loraga_dist.errors import LoragaError
from loraga_dist.ranks.session import StopRequest, leave_process
from loraga_dist.ranks.world import World
from loraga_dist.run.pipeline import run


class StopAfter(StopRequest):
    """Asked for by nobody: the request appears when it has been looked at often enough."""

    def __init__(self, num_looks: int) -> None:
        self._before = {}
        self._num_looks = num_looks
        self._looks = 0

    @property
    def signal_name(self) -> str | None:
        self._looks += 1
        return "SIGUSR1" if self._looks == self._num_looks else None


def start(num_looks: int, config_path: str, overrides: Sequence[str]) -> int:
    """The exit code; in this process, which may be one of several ranks."""
    world = World.start()
    try:
        with world.together():
            config = load_config(config_path, overrides)
        run(config, world, StopAfter(num_looks))
    except LoragaError as error:
        if world.is_main:
            print(error, file=sys.stderr)
        world.barrier()
        return error.exit_code
    world.barrier()
    return 0


if __name__ == "__main__":
    leave_process(start(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
