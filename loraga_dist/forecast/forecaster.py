"""From a request to what it will take, whether that fits, and what to change if it does not; no weights are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loraga_dist.config import GradientConfig, InitConfig
from loraga_dist.data.losses import LOSSES
from loraga_dist.engines.home import DEVICE_SHARE
from loraga_dist.errors import UserError
from loraga_dist.forecast.activations import Rehearsal, Shapes, rehearse
from loraga_dist.forecast.memory import RankMemory, Setting, rank_memory, sink_bytes
from loraga_dist.model.base import BaseModel
from loraga_dist.model.plan import Plan, make_plan
from loraga_dist.model.shape import ModelShape
from loraga_dist.model.targets import Target
from loraga_dist.ranks.memory import free_bytes, free_host_bytes
from loraga_dist.ranks.world import World
from loraga_dist.request.request import Job
from loraga_dist.schemes import SCHEMES
from loraga_dist.sharding.zero3 import read_deepspeed_config
from loraga_dist.start.place import PROBE_TOKENS

MARGIN = 0.1
"""The plan may be off by this share: below 1 - MARGIN of the memory it fits, above 1 + MARGIN it cannot."""

MOST_RANKS = 4096


@dataclass(frozen=True, kw_only=True)
class Forecaster:
    """What a request needs, under the request's own settings or under changed ones."""

    config: InitConfig
    base: BaseModel
    shape: ModelShape
    targets: Sequence[Target]
    on_host: bool
    """The ranks compute on CPUs."""
    device_bytes: float | None = None
    """Memory of one device, where it is known: `gradient.state_device: auto` depends on it."""
    _rehearsals: dict[Any, Rehearsal | None] = field(default_factory=dict, repr=False)

    def plan(self, world_size: int, gradient: GradientConfig | None = None) -> Plan:
        scheme = SCHEMES[self.config.init.scheme]
        return make_plan(self.targets, gradient or self.config.gradient, scheme, world_size)

    def setting(self, plan: Plan, world_size: int) -> Setting:
        zero = read_deepspeed_config(self.config.deepspeed).get("zero_optimization", {})
        sharded = world_size > 1 or self.config.deepspeed is not None
        weights_on_host = sharded and (zero.get("offload_param") or {}).get("device") == "cpu"
        return Setting(
            world_size=world_size,
            sharded=sharded,
            on_host=self.on_host,
            weights_on_host=weights_on_host,
            weights_mapped=self.on_host
            and not sharded
            and all(slot.dtype == self.base.dtype for slot in self.base.index.values()),
            state_on_host=not self.on_host
            and self._state_on_host(plan, 0 if weights_on_host else self.shape.partition_bytes(world_size)),
        )

    def _state_on_host(self, plan: Plan, weights_bytes: int) -> bool:
        """What `StateHome.choose` will do once the weights are on the device."""
        choice = self.config.gradient.state_device
        if choice != "auto" or self.device_bytes is None:
            return choice == "host"
        return plan.state_bytes_per_rank > DEVICE_SHARE * (self.device_bytes - weights_bytes)

    def rehearsal(self, plan: Plan, shapes: Shapes, gradient: GradientConfig, *, gathers: bool) -> Rehearsal | None:
        """Of the sweep whose backward goes deepest: the first, for targets are in module order. Without sweeps there is
        no backward."""
        names = [matrix.name for matrix in plan.groups[0]] if plan.groups else []
        key = (tuple(shapes.items()), tuple(names), gradient.checkpointing, gathers)
        if key not in self._rehearsals:
            self._rehearsals[key] = rehearse(
                self.base.model_class,
                self.base.config,
                self.base.dtype,
                shapes,
                names,
                loss_sum=LOSSES[self.config.lora.task_type],
                checkpointing=gradient.checkpointing,
                gathers=gathers,
                sink_bytes=sink_bytes(plan, math.prod(shapes["input_ids"]), self.base.dtype),
            )
        return self._rehearsals[key]

    def memory(self, rank: int, plan: Plan, shapes: Shapes, setting: Setting) -> RankMemory:
        rehearsal = self.rehearsal(plan, shapes, self.config.gradient, gathers=setting.sharded)
        return rank_memory(rank, plan, self.shape, rehearsal, math.prod(shapes["input_ids"]), setting)

    def activations_known(self, world_size: int, shapes: Shapes) -> bool:
        plan = self.plan(world_size)
        gathers = self.setting(plan, world_size).sharded
        return self.rehearsal(plan, shapes, self.config.gradient, gathers=gathers) is not None

    def worst(self, world_size: int, shapes: Shapes) -> RankMemory:
        """Of the rank that needs most."""
        plan = self.plan(world_size)
        setting = self.setting(plan, world_size)
        work = [0] * world_size
        widths = {matrix.name: matrix.width for matrix in plan.matrices.values()}
        for target in plan.targets:
            work[plan.owners[target.name]] += widths.get(target.name, target.r) * (target.M + target.N)
        workspace = {target.name: plan.scheme.workspace_bytes(target.M, target.N, target.r) for target in plan.targets}
        ranks = {0, work.index(max(work)), plan.owners[max(workspace, key=workspace.__getitem__)]}
        return max((self.memory(rank, plan, shapes, setting) for rank in ranks), key=lambda found: found.peak_bytes)

    def changed(self, **sections: dict[str, Any]) -> Forecaster:
        """The same request with some keys changed."""
        update = {name: getattr(self.config, name).model_copy(update=keys) for name, keys in sections.items()}
        return replace(self, config=self.config.model_copy(update=update))


def batch_shapes(config: InitConfig, base: BaseModel) -> dict[str, tuple[int, ...]]:
    """The largest microbatch the settings allow; where none is needed, the probe that compares logits."""
    calibration = config.calibration
    length, size = calibration.max_length, min(calibration.per_device_batch_size, calibration.most_samples)
    if SCHEMES[config.init.scheme].source != "gradient" and not calibration.names_data:
        length, size = PROBE_TOKENS, 1
    length = min(length, base.max_positions or length)
    labels = (size,) if config.lora.task_type == "SEQ_CLS" else (size, length)
    return {"input_ids": (size, length), "attention_mask": (size, length), "labels": labels}


def verdict(peak_bytes: int, limit_bytes: float) -> str:
    """`fits`, `tight` (the plan is not exact enough to say) or `too large`."""
    if peak_bytes <= (1 - MARGIN) * limit_bytes:
        return "fits"
    return "tight" if peak_bytes <= (1 + MARGIN) * limit_bytes else "too large"


def forecaster_of(job: Job, config: InitConfig, world: World) -> Forecaster:
    on_host = world.device.type == "cpu"
    return Forecaster(
        config=config,
        base=job.base,
        shape=job.shape,
        targets=job.plan.targets,
        on_host=on_host,
        device_bytes=None if on_host else free_bytes(world.device, world.ranks_on_node),
    )


def planned_memory(job: Job, config: InitConfig, world: World) -> RankMemory:
    """What this rank will hold, for its own largest microbatch."""
    forecaster = forecaster_of(job, config, world)
    return forecaster.memory(world.rank, job.plan, largest_microbatch(job), forecaster.setting(job.plan, world.size))


def largest_microbatch(job: Job) -> Shapes:
    """Shapes of this rank's microbatch with most tokens; of the probe where there is no data."""
    if job.deal is None:
        return batch_shapes(job.config, job.base)
    microbatches = job.deal.microbatches(0, job.deal.num_samples, 0)
    largest = max(microbatches, key=lambda microbatch: microbatch.inputs["input_ids"].numel())
    return {name: tuple(tensor.shape) for name, tensor in largest.inputs.items()}


def refuse_what_cannot_fit(planned: RankMemory, job: Job, config: InitConfig, world: World) -> None:
    """Raise UserError, with advice, where this rank's memory is too small even if the plan is too high by MARGIN."""
    kinds = [(planned.required_bytes, free_bytes(world.device, world.ranks_on_node), "its device")]
    if planned.host:
        kinds.append((planned.host_peak_bytes, free_host_bytes() // world.ranks_on_node, "the host"))
    for needed, free, where in kinds:
        if verdict(needed, free) == "too large":
            changes = ["use more nodes, or fewer ranks on each, or lower gradient.state_budget_gib"]
            if where == "its device":
                changes = advice(forecaster_of(job, config, world), world.size, free)
            raise UserError(
                "model.name_or_path",
                config.model.name_or_path,
                f"needs {_gib(needed)} GiB on rank {world.rank}, {where} has {_gib(free)} GiB free; "
                + "; ".join(changes),
            )


def advice(forecaster: Forecaster, world_size: int, limit_bytes: float) -> list[str]:
    """What to change where a plan does not fit, with the peak each change leads to; where it fits, what is faster."""
    now = forecaster.worst(world_size, batch_shapes(forecaster.config, forecaster.base)).peak_bytes
    if verdict(now, limit_bytes) == "fits":
        return _fewer_sweeps(forecaster, world_size, limit_bytes)
    lines = []
    if not forecaster.on_host or world_size > 1:
        lines.append(_ranks_that_fit(forecaster, world_size, limit_bytes))
    all_changes: dict[str, dict[str, Any]] = {}
    for text, section, keys in _changes(forecaster.config):
        peak = _peak(forecaster.changed(**{section: keys}), world_size)
        if peak < 0.99 * now:
            lines.append(f"{text}: {_gib(peak)} GiB ({verdict(peak, limit_bytes)})")
            all_changes[section] = all_changes.get(section, {}) | keys
    if len([keys for section in all_changes.values() for keys in section]) > 1:
        together = forecaster.changed(**all_changes)
        peak = _peak(together, world_size)
        lines.append(f"all of these: {_gib(peak)} GiB ({verdict(peak, limit_bytes)})")
        if verdict(peak, limit_bytes) != "fits":
            lines.append(f"with all of these, {_ranks_that_fit(together, world_size, limit_bytes)}")
    setting = forecaster.setting(forecaster.plan(world_size), world_size)
    if not forecaster.on_host and not setting.weights_on_host and world_size > 1:
        weights = forecaster.shape.partition_bytes(world_size)
        lines.append(
            f"deepspeed: configs/deepspeed/zero3_offload_cpu.json moves {_gib(weights)} GiB of weights per rank to the "
            f"host: {_gib(now - weights)} GiB ({verdict(now - weights, limit_bytes)})"
        )
    return lines


def _fewer_sweeps(forecaster: Forecaster, world_size: int, limit_bytes: float) -> list[str]:
    """The smallest budget with which one sweep over the data does, or else half of the sweeps, if that fits."""
    sweeps = forecaster.plan(world_size).groups
    if not sweeps:
        return []
    everything = sum(Plan.state_bytes(sweep) for sweep in sweeps) / 2**30
    for wanted in sorted({1, -(-len(sweeps) // 2)} - {len(sweeps)}):
        budget = math.ceil(10.5 * everything / wanted) / 10
        changed = forecaster.changed(gradient={"state_budget_gib": budget})
        peak, count = _peak(changed, world_size), len(changed.plan(world_size).groups)
        if verdict(peak, limit_bytes) == "fits" and count < len(sweeps):
            return [f"gradient.state_budget_gib {budget:g}: {count} instead of {len(sweeps)} sweeps, {_gib(peak)} GiB"]
    return []


def _changes(config: InitConfig) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Settings that cost time or tokens and save memory: what to write, section, keys."""
    gradient, calibration = config.gradient, config.calibration
    if gradient.checkpointing == "none":
        yield "gradient.checkpointing non_reentrant", "gradient", {"checkpointing": "non_reentrant"}
    if calibration.per_device_batch_size > 1:
        yield "calibration.per_device_batch_size 1", "calibration", {"per_device_batch_size": 1}
    if calibration.max_length >= 512:
        length = calibration.max_length // 2
        yield f"calibration.max_length {length}", "calibration", {"max_length": length}
    if gradient.state_device != "host":
        yield "gradient.state_device host (copies in every backward)", "gradient", {"state_device": "host"}
    budget = gradient.state_budget_gib / 4
    yield f"gradient.state_budget_gib {budget:g} (more sweeps)", "gradient", {"state_budget_gib": budget}


def _ranks_that_fit(forecaster: Forecaster, world_size: int, limit_bytes: float) -> str:
    """The fewest ranks that hold the plan, by bisection: more ranks never need more each."""
    low, high = world_size, MOST_RANKS
    if verdict(_peak(forecaster, high), limit_bytes) != "fits":
        return f"no number of ranks up to {MOST_RANKS} fits: what a rank holds beside its weights is too much"
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if verdict(_peak(forecaster, middle), limit_bytes) == "fits" else (middle, high)
    return f"{high} ranks fit: {_gib(_peak(forecaster, high))} GiB each"


def _peak(forecaster: Forecaster, world_size: int) -> int:
    return forecaster.worst(world_size, batch_shapes(forecaster.config, forecaster.base)).peak_bytes


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f}"
