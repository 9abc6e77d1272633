"""What to change where a plan does not fit, and what is faster where it does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from loraga_dist.config import InitConfig
from loraga_dist.errors import UserError
from loraga_dist.forecast.forecaster import Forecaster
from loraga_dist.forecast.memory import RankMemory
from loraga_dist.forecast.ways import Room, verdict
from loraga_dist.model.plan import Plan
from loraga_dist.ranks.memory import free_bytes, free_host_bytes
from loraga_dist.ranks.world import World

MOST_RANKS = 4096


def refuse_what_cannot_fit(planned: RankMemory, forecaster: Forecaster, world: World) -> None:
    """Raise UserError, with advice, where this rank's memory is too small even if the plan is too high by MARGIN."""
    kinds = [(planned.required_bytes, free_bytes(world.device, world.ranks_on_node), "its device")]
    if planned.host:
        kinds.append((planned.host_peak_bytes, free_host_bytes() // world.ranks_on_node, "the host"))
    for needed, free, where in kinds:
        if verdict(needed, free) == "too large":
            changes = ["use more nodes, or fewer ranks on each, or lower gradient.state_budget_gib"]
            if where == "its device":
                changes = advice(forecaster, free, needed)
            raise UserError(
                "model.name_or_path",
                forecaster.config.model.name_or_path,
                f"needs {_gib(needed)} GiB on rank {world.rank}, {where} has {_gib(free)} GiB free; "
                + "; ".join(changes),
            )


def advice(forecaster: Forecaster, limit_bytes: float, needed_bytes: float = math.inf) -> list[str]:
    """What to change where a plan does not fit, with the peak each change leads to; where it fits, what is faster.

    needed_bytes: of the data as it is, which may be shorter than the settings allow.
    """

    def judged(peak_bytes: float) -> str:
        return f"{_gib(peak_bytes)} GiB ({verdict(peak_bytes, limit_bytes)})"

    if forecaster.chosen is None:
        forecaster = forecaster.fitting(Room(device_bytes=limit_bytes))
    now, world_size = forecaster.peak_bytes, forecaster.world_size
    if verdict(now, limit_bytes) == "fits":
        return _fewer_sweeps(forecaster, limit_bytes)
    lines = []
    if not forecaster.on_host or world_size > 1:
        lines.append(_ranks_that_fit(forecaster, limit_bytes))
    all_changes: dict[str, dict[str, Any]] = {}
    for text, section, keys in _changes(forecaster.config):
        peak = forecaster.changed(**{section: keys}).peak_within(limit_bytes)
        if peak < 0.99 * min(now, needed_bytes):
            lines.append(f"{text}: {judged(peak)}")
            all_changes[section] = all_changes.get(section, {}) | keys
    if sum(map(len, all_changes.values())) > 1:
        together = forecaster.changed(**all_changes)
        peak = together.peak_within(limit_bytes)
        lines.append(f"all of these: {judged(peak)}")
        if verdict(peak, limit_bytes) != "fits":
            lines.append(f"with all of these, {_ranks_that_fit(together, limit_bytes)}")
    if not forecaster.on_host and not forecaster.setting.weights_on_host and world_size > 1:
        weights = forecaster.request.shape.partition_bytes(world_size)
        lines.append(
            f"deepspeed: configs/deepspeed/zero3_offload_cpu.json moves {_gib(weights)} GiB of weights per rank to the "
            f"host: {judged(now - weights)}"
        )
    return lines


def _fewer_sweeps(forecaster: Forecaster, limit_bytes: float) -> list[str]:
    """In model order: the smallest budget with which one sweep over the data does, or else half of them, if it fits."""
    sweeps = forecaster.plan.groups
    if not sweeps or forecaster.way.order.blocks is not None:
        return []
    everything = sum(Plan.state_bytes(sweep) for sweep in sweeps) / 2**30
    for wanted in sorted({1, -(-len(sweeps) // 2)} - {len(sweeps)}):
        budget = math.ceil(10.5 * everything / wanted) / 10
        changed = replace(forecaster.changed(gradient={"state_budget_gib": budget}), chosen=forecaster.way)
        peak, count = changed.peak_bytes, len(changed.plan.groups)
        if verdict(peak, limit_bytes) == "fits" and count < len(sweeps):
            return [f"gradient.state_budget_gib {budget:g}: {count} instead of {len(sweeps)} sweeps, {_gib(peak)} GiB"]
    return []


def _changes(config: InitConfig) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Settings that cost time or tokens and save memory: what to write, section, keys."""
    gradient, calibration = config.gradient, config.calibration
    if gradient.order == "model":
        yield "gradient.order auto", "gradient", {"order": "auto"}
    if gradient.checkpointing == "none":
        yield "gradient.checkpointing auto", "gradient", {"checkpointing": "auto"}
    if calibration.per_device_batch_size > 1:
        yield "calibration.per_device_batch_size 1", "calibration", {"per_device_batch_size": 1}
    if calibration.max_length >= 512:
        length = calibration.max_length // 2
        yield f"calibration.max_length {length}", "calibration", {"max_length": length}
    if gradient.state_device != "host":
        yield "gradient.state_device host (copies in every backward)", "gradient", {"state_device": "host"}
    budget = gradient.state_budget_gib / 4
    yield f"gradient.state_budget_gib {budget:g} (more sweeps)", "gradient", {"state_budget_gib": budget}


def _ranks_that_fit(forecaster: Forecaster, limit_bytes: float) -> str:
    """The fewest ranks that hold the plan, by bisection: more ranks never need more each."""

    def peak_bytes(world_size: int) -> float:
        return forecaster.peak_within(limit_bytes, world_size=world_size)

    low, high = forecaster.world_size, MOST_RANKS
    if verdict(peak_bytes(high), limit_bytes) != "fits":
        return f"no number of ranks up to {MOST_RANKS} fits: what a rank holds beside its weights is too much"
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if verdict(peak_bytes(middle), limit_bytes) == "fits" else (middle, high)
    return f"{high} ranks fit: {_gib(peak_bytes(high))} GiB each"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f}"
