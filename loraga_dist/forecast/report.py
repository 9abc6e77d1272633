"""`loraga-dist plan`: what a request will take, as one JSON object and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from loraga_dist.artifacts.residual import num_residual_bytes, writes_residual
from loraga_dist.forecast.forecaster import Forecaster, advice, verdict
from loraga_dist.forecast.memory import disk_bytes, work
from loraga_dist.model.plan import Plan
from loraga_dist.model.rank_budget import num_parameters
from loraga_dist.schemes import SCHEMES

UTILISATION = (0.5, 0.2)
"""Shares of a device's peak flops between which the time range is drawn."""

_GIB = 2**30


def plan_report(
    forecaster: Forecaster,
    world_size: int,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    num_sequences: int | None = None,
    gib_per_rank: float | None = None,
    device_tflops: float | None = None,
) -> dict[str, Any]:
    """Everything the plan says. Sizes are bytes, of the rank that needs most.

    shapes, num_sequences: of the calibration data where it has been read; else the most that the config allows.
    """
    if gib_per_rank is not None:
        forecaster = replace(forecaster, device_bytes=gib_per_rank * _GIB)
    request, config = forecaster.request, forecaster.config
    base, shape = request.base, request.shape
    shapes_known = shapes or forecaster.largest_allowed()
    plan = forecaster.plan(world_size)
    num_sequences = (num_sequences or config.calibration.most_samples) if plan.groups else 0
    batch, length = shapes_known["input_ids"]
    microbatches = -(-num_sequences // (world_size * batch))
    refine_passes = 0 if config.gradient.refine_passes == "auto" else config.gradient.refine_passes
    done = work(
        plan,
        shape,
        num_tokens=num_sequences * length,
        microbatches_per_rank=microbatches,
        world_size=world_size,
        checkpointed=config.gradient.checkpointing != "none",
        refine_passes=refine_passes,
    )
    flops = sum(done.flops.values())
    worst = forecaster.worst(world_size, shapes_known)
    plain, recomputing = (
        forecaster.changed(gradient={"checkpointing": kind}).worst(world_size, shapes_known)
        for kind in ("none", "non_reentrant")
    )
    limit_bytes = None if gib_per_rank is None else gib_per_rank * _GIB
    found = None if limit_bytes is None else verdict(worst.peak_bytes, limit_bytes)
    return {
        "scheme": config.init.scheme,
        "model": {
            "name_or_path": config.model.name_or_path,
            "class": base.model_class.__name__,
            "parameters": sum(shape.numels),
            "dtype": str(base.dtype).removeprefix("torch."),
            "bytes": shape.num_bytes,
            "from_config_alone": not base.index,
        },
        "ranks": world_size,
        "device": "cpu" if forecaster.on_host else "cuda",
        "calibration": {
            "data_read": shapes is not None,
            "sequences": num_sequences,
            "tokens_per_sequence": length,
            "sequences_per_microbatch": batch,
            "microbatches_per_rank": microbatches,
            "refine_passes": config.gradient.refine_passes,
        },
        "targets": _kinds(plan),
        "owners": _owners(plan, world_size),
        "rank_budget": None
        if config.init.rank_budget is None
        else {"parameters": config.init.rank_budget, "at_largest_ranks": num_parameters(plan.targets)},
        "sweeps": {
            "count": len(plan.groups),
            "targets": [len(group) for group in plan.groups],
            "state_bytes": [plan.state_bytes(group) for group in plan.groups],
        },
        "memory_per_rank": {
            "peak_bytes": worst.peak_bytes,
            "peak_phase": worst.peak_phase,
            "host_peak_bytes": worst.host_peak_bytes,
            "peak_bytes_without_checkpointing": plain.peak_bytes,
            "peak_bytes_with_checkpointing": recomputing.peak_bytes,
            "partition_bytes": shape.partition_bytes(world_size),
            "largest_gathered_module_bytes": shape.largest_module_numel * shape.num_bytes_each,
            "activations_known": forecaster.activations_known(world_size, shapes_known),
            "device_bytes": worst.device,
            "host_bytes": worst.host,
        },
        "disk_bytes": disk_bytes(plan, _residual_bytes(forecaster)),
        "traffic_bytes_per_rank": done.traffic_bytes_per_rank,
        "flops": done.flops,
        "seconds": None
        if device_tflops is None
        else {
            "at_least": flops / (world_size * device_tflops * 1e12 * UTILISATION[0]),
            "at_most": flops / (world_size * device_tflops * 1e12 * UTILISATION[1]),
            "device_tflops": device_tflops,
        },
        "gib_per_rank": gib_per_rank,
        "verdict": found,
        "advice": [] if limit_bytes is None else advice(forecaster, world_size, limit_bytes),
    }


def print_plan(report: Mapping[str, Any]) -> None:
    console = Console(highlight=False, markup=False, width=None if Console().is_terminal else 110)
    model, calibration, memory = report["model"], report["calibration"], report["memory_per_rank"]
    title = SCHEMES[report["scheme"]].title
    console.print(_targets_table(report))
    console.print(_memory_table(memory))
    sweeps, owners, disk = report["sweeps"], report["owners"], report["disk_bytes"]
    bound = "" if calibration["data_read"] else " at most (max_samples x max_length)"
    traffic = ", ".join(f"{part} {_gib(value)}" for part, value in report["traffic_bytes_per_rank"].items())
    lines = {
        "model": f"{model['class']}, {model['parameters'] / 1e9:.2f} billion parameters, {_gib(model['bytes'])} GiB in "
        f"{model['dtype']}" + (" (from config.json alone)" if model["from_config_alone"] else ""),
        "data": f"none: {title} takes no gradient"
        if not sweeps["count"]
        else f"{calibration['sequences']} sequences x {calibration['tokens_per_sequence']} tokens{bound}; "
        f"{calibration['microbatches_per_rank']} microbatches of {calibration['sequences_per_microbatch']} per rank",
        "sweeps": "0 over the data; no engine state"
        if not sweeps["count"]
        else f"{sweeps['count']} over the data, of {_spread(sweeps['targets'])} targets; engine state "
        f"{_gib(max(sweeps['state_bytes']))} GiB at most",
        "owners": f"{_spread(owners['targets_per_rank'])} targets per rank; "
        f"the busiest has {owners['busiest_to_mean']:.2f} of the mean factorization work",
        "peak per rank": f"{_gib(memory['peak_bytes'])} GiB ({memory['peak_phase']}); with checkpointing "
        f"{_gib(memory['peak_bytes_with_checkpointing'])}, without {_gib(memory['peak_bytes_without_checkpointing'])}"
        + (f"; host {_gib(memory['host_peak_bytes'])}" if memory["host_peak_bytes"] else ""),
        "disk GiB": ", ".join(f"{name} {_gib(num_bytes)}" for name, num_bytes in disk.items()),
        "traffic GiB": f"{traffic}; received per rank",
        "flops": "none of gradients; factorizations are not counted"
        if not sweeps["count"]
        else f"{sum(report['flops'].values()):.3g}, of which the engines "
        f"{report['flops']['engine'] / sum(report['flops'].values()):.1%}; attention scores not counted",
        "time": _time(report),
    }
    if budget := report["rank_budget"]:
        lines["rank budget"] = (
            f"{budget['parameters']} parameters; r above is the most a target may get, and all is planned for that "
            f"({budget['at_largest_ranks']} parameters)"
        )
    if not memory["activations_known"]:
        lines["warning"] = "activations are not counted: this model's code depends on its data"
    if report["verdict"]:
        lines["verdict"] = f"{report['verdict']}, on ranks of {report['gib_per_rank']:g} GiB"
    for label, value in lines.items():
        console.print(f"{label + ':':<15} {value}", soft_wrap=True)
    for line in report["advice"]:
        console.print(f"  - {line}", soft_wrap=True)


def _time(report: Mapping[str, Any]) -> str:
    seconds = report["seconds"]
    if not report["sweeps"]["count"]:
        return "that of loading, factorizing and writing"
    if seconds is None:
        return "add --device_tflops (the data sheet's peak in this dtype) for an estimate"
    return (
        f"{seconds['at_least'] / 60:.1f} to {seconds['at_most'] / 60:.1f} minutes of arithmetic, at "
        f"{UTILISATION[0]:.0%} to {UTILISATION[1]:.0%} of {seconds['device_tflops']:g} TFLOPS per rank"
    )


def _targets_table(report: Mapping[str, Any]) -> Table:
    title = SCHEMES[report["scheme"]].title
    table = Table(title=f"{title} plan of {report['model']['name_or_path']} on {report['ranks']} ranks")
    for column in ("module", "targets", "M x N", "r", "engine", "K", "state MiB each"):
        table.add_column(column, justify="left" if column in ("module", "engine") else "right")
    for kind in report["targets"]:
        table.add_row(
            kind["module"],
            str(kind["count"]),
            f"{kind['M']} x {kind['N']}",
            str(kind["r"]),
            kind["engine"] or "-",
            "-" if kind["width"] is None else str(kind["width"]),
            f"{kind['state_bytes_each'] / 2**20:.1f}",
        )
    return table


def _memory_table(memory: Mapping[str, Any]) -> Table:
    table = Table(title="GiB on the rank that needs most")
    table.add_column("phase")
    sides = [("", memory["device_bytes"]), ("host: ", memory["host_bytes"])]
    columns = list(dict.fromkeys((side, part) for side, phases in sides for parts in phases.values() for part in parts))
    for side, part in columns:
        table.add_column(side + part, justify="right")
    table.add_column("sum", justify="right")
    held = dict(sides)
    for phase, parts in memory["device_bytes"].items():
        values = [held[side].get(phase, {}).get(part) for side, part in columns]
        texts = ["" if value is None else f"{value / _GIB:.2f}" for value in values]
        table.add_row(phase, *texts, f"{sum(parts.values()) / _GIB:.2f}")
    return table


def _kinds(plan: Plan) -> list[dict[str, Any]]:
    matrices = plan.matrices
    kinds: dict[tuple[Any, ...], dict[str, Any]] = {}
    for target in plan.targets:
        matrix = matrices.get(target.name)
        engine, width = (None, None) if matrix is None else (matrix.engine, matrix.width)
        key = (target.name.rpartition(".")[2], target.M, target.N, target.r, engine, width)
        names = ("module", "M", "N", "r", "engine", "width")
        state_bytes = 0 if matrix is None else plan.state_bytes([matrix])
        kind = kinds.setdefault(key, dict(zip(names, key, strict=True)) | {"count": 0, "state_bytes_each": state_bytes})
        kind["count"] += 1
    return list(kinds.values())


def _owners(plan: Plan, world_size: int) -> dict[str, Any]:
    targets, cost = [0] * world_size, [0] * world_size
    for name, cost_of_target in plan.costs.items():
        targets[plan.owners[name]] += 1
        cost[plan.owners[name]] += cost_of_target
    return {"targets_per_rank": targets, "busiest_to_mean": max(cost) * world_size / sum(cost)}


def _residual_bytes(forecaster: Forecaster) -> int:
    output, index = forecaster.config.output, forecaster.request.base.index
    if not writes_residual(forecaster.config):
        return 0
    if index:
        return num_residual_bytes(index, output.residual_dtype)
    each = None if output.residual_dtype == "auto" else getattr(torch, output.residual_dtype).itemsize
    return sum(forecaster.request.shape.numels) * (each or forecaster.request.shape.num_bytes_each)


def _spread(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.1f}" if num_bytes >= _GIB else f"{num_bytes / _GIB:.3f}"
