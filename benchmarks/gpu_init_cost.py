"""What a LoRA-GA start costs on one GPU: Llama-2-7B's shape, random bfloat16 weights, 64 x 1024 tokens, r = 8 and 128.

    python benchmarks/gpu_init_cost.py --json gpu_init_cost.json
    python benchmarks/gpu_init_cost.py --small    # a tiny model, also without a GPU

Needs torch, transformers, peft and safetensors beside the package's own small dependencies. Times are between CUDA
events, peaks those of torch's allocator. PEFT runs where its copy of the model and all gradients fit.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from cost_runs import Bench, Outcome, Shape, one_process
from memory import hardware
from rich.console import Console
from rich.table import Table

from loraga_dist.artifacts.report import versions

LLAMA_2_7B = Shape(
    hidden=4096,
    intermediate=11008,
    layers=32,
    heads=32,
    key_value_heads=32,
    microbatches=64,
    tokens=1024,
    vocabulary=32000,
)
SMALL = Shape(hidden=256, intermediate=688, layers=1, heads=4, key_value_heads=4, microbatches=3, tokens=128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model; runs without a GPU, too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --small runs without one")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    base = SMALL if options.small else LLAMA_2_7B
    ranks = (4, 8) if options.small else (8, 128)
    rows: list[dict[str, Any]] = []
    for r in ranks:
        bench = Bench(replace(base, r=r), one_process(device))
        rows += compare(bench, options.repeats)
        del bench  # the next one needs its memory
        if device.type == "cuda":
            torch.cuda.empty_cache()
    show(rows)
    if options.json:
        content = {"shape": asdict(base), "runs": rows, "hardware": hardware(), "versions": versions()}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


def compare(bench: Bench, repeats: int) -> list[dict[str, Any]]:
    bench.warm_up()
    runs: dict[str, list[Outcome]] = {"floor": [], "sketch": [], "sketch, state on host": [], "peft": []}
    for _ in range(repeats):
        runs["floor"].append(bench.floor())
        runs["sketch"].append(bench.sketch())
        runs["sketch, state on host"].append(bench.sketch(state_device="host"))
    try:
        runs["peft"] = [bench.peft() for _ in range(repeats)]
    except torch.cuda.OutOfMemoryError:
        print("PEFT does not fit on this device")
    floor_seconds = statistics.median(outcome.seconds for outcome in runs["floor"])
    floor_bytes = statistics.median(outcome.peak_bytes for outcome in runs["floor"])
    return [
        {
            "way": way,
            "r": bench.shape.r,
            "seconds": [outcome.seconds for outcome in outcomes],
            "over_floor": statistics.median(outcome.seconds for outcome in outcomes) / floor_seconds,
            "extra_bytes": statistics.median(outcome.peak_bytes for outcome in outcomes) - floor_bytes,
            "details": outcomes[0].details,
        }
        for way, outcomes in runs.items()
        if outcomes
    ]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table()
    for column in ("", "r", "seconds", "x floor", "extra MiB"):
        table.add_column(column, justify="right")
    for row in rows:
        seconds = statistics.median(row["seconds"])
        extra_mib = row["extra_bytes"] / 2**20
        table.add_row(row["way"], str(row["r"]), f"{seconds:.2f}", f"{row['over_floor']:.3f}", f"{extra_mib:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
