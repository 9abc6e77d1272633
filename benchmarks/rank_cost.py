"""What a start costs under ZeRO-3 on some number of ranks; `init_cost.py --sweep` runs it on 1, 2 and 4.

    torchrun --standalone --nproc_per_node 2 benchmarks/rank_cost.py --json two_ranks.json

Ranks share out the same microbatches. In turns, `--repeats` times: *floor* (forward and input gradients alone), *auto*
and *sketch*. Seconds of cores are summed over ranks; memory is that of the rank that takes most.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from cost_runs import Bench, Outcome, Shape
from transformers.utils import logging

from loraga_dist.ranks.memory import return_freed_memory_at_once
from loraga_dist.ranks.session import run_as_rank
from loraga_dist.ranks.words import leave_process
from loraga_dist.ranks.world import World
from loraga_dist.sharding.zero3 import Zero3

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SHAPE = Shape(hidden=1024, intermediate=2752, layers=2, heads=8, key_value_heads=8, microbatches=16, tokens=256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="less data")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the model")
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    options = parser.parse_args()
    logging.set_verbosity_error()
    return_freed_memory_at_once()
    leave_process(run_as_rank(lambda world, stop: measure(options, world)))


def measure(options: argparse.Namespace, world: World) -> None:
    """Run every way in turns and write the figures. A collective."""
    # one rank is sharded, too, so that points differ in their number only
    shape = replace(SHAPE, microbatches=4) if options.quick else SHAPE
    bench = Bench(shape, Zero3(world, None), DTYPES[options.dtype])
    bench.warm_up()
    runs: dict[str, list[Outcome]] = {"floor": [], "auto": [], "sketch": []}
    for _ in range(options.repeats):
        for way, outcomes in runs.items():
            world.barrier()
            outcomes.append(getattr(bench, way)())
    figures = point(runs, world)
    if world.is_main:
        content = {"quantity": "ranks", "value": world.size, "shape": asdict(bench.shape)} | figures
        options.json.write_text(json.dumps(content))


def point(runs: dict[str, list[Outcome]], world: World) -> dict[str, dict[str, float]]:
    """Medians over repeats. A collective."""
    mine = {
        way: [[outcome.seconds, outcome.cpu_seconds, outcome.peak_bytes] for outcome in outcomes]
        for way, outcomes in runs.items()
    }
    everyone: list[dict[str, Any]] = world.all_json(mine)
    figures = {}
    for way, outcomes in runs.items():
        repeats = [[of_rank[way][index] for of_rank in everyone] for index in range(len(outcomes))]
        figures[way] = {
            "seconds": statistics.median(max(seconds for seconds, _, _ in ranks) for ranks in repeats),
            "cpu_seconds": statistics.median(sum(seconds for _, seconds, _ in ranks) for ranks in repeats),
            "peak_bytes": statistics.median(max(peak for _, _, peak in ranks) for ranks in repeats),
        }
    for of_way in figures.values():
        of_way["extra_bytes"] = of_way["peak_bytes"] - figures["floor"]["peak_bytes"]
    return figures


if __name__ == "__main__":
    main()
