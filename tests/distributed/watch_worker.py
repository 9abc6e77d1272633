"""Each rank: watch the others; rank `sys.argv[2]` ends or freezes as `sys.argv[1]` says while the rest wait for it."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from loraga_dist.ranks.session import leave_process
from loraga_dist.ranks.watch import Watch
from loraga_dist.ranks.world import World


def main() -> None:
    how, who = sys.argv[1], int(sys.argv[2])
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
    world.barrier()
    leave_process(0)


if __name__ == "__main__":
    main()
