"""How much of a sharded model is gathered for a start, in block order and in model order, and what that costs.

    python benchmarks/traffic.py --json traffic.json   # two ranks on this machine, some minutes on two cores
    python benchmarks/traffic.py --quick               # a small model, seconds

Two ranks of ZeRO-3 take more and more microbatches through a random float32 Llama, forward, and backward to the inputs
of all targets, which nobody looks at: engines do the same in both orders. Each gathered byte is counted where the
collective is called. *floor* is one process that holds the whole model and does the same with the threads of both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from cost_runs import Bench, Shape, one_process
from memory import hardware
from rich.console import Console
from rich.table import Table
from torchrun import json_of_ranks
from transformers.utils import logging

from loraga_dist.artifacts.report import versions
from loraga_dist.config import GradientConfig, MethodConfig, OrderName
from loraga_dist.data.losses import causal_lm
from loraga_dist.gradients.block_order import BlockOrder, OnWay
from loraga_dist.gradients.kept import Keeping
from loraga_dist.gradients.route import ModelOrder, Route
from loraga_dist.ranks.memory import return_freed_memory_at_once
from loraga_dist.ranks.session import run_as_rank
from loraga_dist.ranks.words import leave_process
from loraga_dist.ranks.world import World
from loraga_dist.sharding import zero3

RANKS = 2
SHAPE = Shape(hidden=512, intermediate=1376, layers=8, heads=8, key_value_heads=8, microbatches=0, tokens=64)
QUICK = Shape(
    hidden=64, intermediate=96, layers=3, heads=4, key_value_heads=4, microbatches=0, tokens=16, vocabulary=128, r=2
)
PER_RANK, QUICK_PER_RANK = (2, 8, 32), (1, 4)
"""Microbatches of a rank."""
ORDERS: tuple[OrderName, ...] = ("block", "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--as_rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    return_freed_memory_at_once()
    if options.as_rank:
        leave_process(run_as_rank(lambda world, stop: measure(options, world)))
    repeats = ["--repeats", str(options.repeats), *(["--quick"] if options.quick else [])]
    rows = json_of_ranks(__file__, RANKS, "--as_rank", *repeats)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for row, shape in zip(rows, shapes_of(options), strict=True):
        bench = Bench(shape, one_process(torch.device("cpu")), torch.float32)
        bench.floor()  # kernels are chosen at the first call of a shape
        row["floor_seconds"] = statistics.median(bench.floor().seconds for _ in range(options.repeats))
    show(rows)
    if options.json:
        content = {"runs": rows, "hardware": hardware(), "threads": torch.get_num_threads(), "versions": versions()}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


def shapes_of(options: argparse.Namespace) -> list[Shape]:
    shape, per_rank = (QUICK, QUICK_PER_RANK) if options.quick else (SHAPE, PER_RANK)
    return [replace(shape, microbatches=RANKS * count) for count in per_rank]


def measure(options: argparse.Namespace, world: World) -> None:
    """Run both orders in turns and write the figures. A collective."""
    rows = []
    for shape in shapes_of(options):
        bench = Bench(shape, zero3.Zero3(world, None), torch.float32)
        model_bytes = sum(parameter.ds_numel * parameter.element_size() for parameter in bench.model.parameters())
        bench.floor()  # kernels are chosen at the first call of a shape
        seconds: dict[str, list[float]] = {order: [] for order in ORDERS}
        row: dict[str, Any] = {"shape": asdict(shape), "model_bytes": model_bytes}
        for _ in range(options.repeats):
            for order in ORDERS:
                with gathers() as sizes:
                    seconds[order].append(max(world.all_json(go_through(bench, order))))
                row[f"{order}_gathered_bytes"] = sum(sizes)
        row |= {f"{order}_seconds": statistics.median(of_order) for order, of_order in seconds.items()}
        turns = zip(seconds["block"], seconds["model"], strict=True)
        row["block_over_model"] = statistics.median(block / model for block, model in turns)
        rows.append(row)
        if world.is_main:
            print(row, flush=True)
    if world.is_main:
        options.json.write_text(json.dumps(rows))


def go_through(bench: Bench, order: OrderName) -> float:
    """Take all microbatches through the model once; seconds. A collective."""
    model, sharding = bench.model, bench.sharding
    plan = bench.plan(MethodConfig(gradient=GradientConfig(order=order)))
    route: Route = ModelOrder(model, causal_lm, sharding=sharding, checkpointing="none")
    if plan.order.blocks is not None:
        on_way = OnWay(pause=lambda: None, advance=lambda: None)
        targets = list(plan.matrices)
        route = BlockOrder(
            model, plan.order.blocks, causal_lm, targets=targets, sharding=sharding, keeping=Keeping(), on_way=on_way
        )
    bench.world.barrier()
    started = time.perf_counter()
    with route.opened():
        for group in plan.groups:
            with route.showing(bench.microbatches, [matrix.name for matrix in group], lambda *_: None) as take:
                for microbatch in bench.microbatches:
                    take(microbatch)
    return time.perf_counter() - started


@contextmanager
def gathers() -> Iterator[list[int]]:
    """The bytes that each gather of parameters makes whole on this rank, while the context lasts."""
    sizes: list[int] = []
    gather = zero3.all_gather_in_place

    def counting(output_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(output_tensor.nbytes)
        return gather(output_tensor, *args, **kwargs)

    zero3.all_gather_in_place = counting
    try:
        yield sizes
    finally:
        zero3.all_gather_in_place = gather


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=f"{RANKS} ranks, {rows[0]['model_bytes'] / 2**20:.0f} MiB of float32")
    for column in (
        "microbatches per rank",
        "gathered / model, block order",
        "gathered / model, model order",
        "seconds, block order",
        "seconds, model order",
        "block / model",
        "floor, seconds",
        "block / floor",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["shape"]["microbatches"] // RANKS),
            *(f"{row[f'{order}_gathered_bytes'] / row['model_bytes']:.3f}" for order in ORDERS),
            *(f"{row[f'{order}_seconds']:.2f}" for order in ORDERS),
            f"{row['block_over_model']:.3f}",
            f"{row['floor_seconds']:.2f}",
            f"{row['block_seconds'] / row['floor_seconds']:.3f}",
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
