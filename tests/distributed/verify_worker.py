"""Each rank: verify the directories named on the command line together with the others, write what it was told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from loraga_dist.artifacts.verify import verify
from loraga_dist.ranks.session import leave_process
from loraga_dist.ranks.world import World

if __name__ == "__main__":
    report_dir, *directories = map(Path, sys.argv[1:])
    world = World.start()
    num_bytes: list[int] = []
    found = [verify(directory, world=world, on_progress=num_bytes.append).problems for directory in directories]
    (report_dir / f"rank{world.rank}.json").write_text(json.dumps([found, sum(num_bytes)]))
    world.barrier()
    leave_process(0)
