"""From a request to what it will take, whether that fits, and what to change if it does not; no weights are read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from loraga_dist.config import InitConfig
from loraga_dist.data.losses import LOSSES
from loraga_dist.data.microbatches import PROBE_TOKENS
from loraga_dist.engines import ENGINES
from loraga_dist.engines.home import DEVICE_SHARE
from loraga_dist.errors import UserError
from loraga_dist.forecast.activations import Activations, Shapes, forecast_activations
from loraga_dist.forecast.memory import RankMemory, Setting, rank_memory, weight_workspace_bytes
from loraga_dist.model.blocks import choose_order
from loraga_dist.model.plan import Plan, make_plan
from loraga_dist.ranks.memory import free_bytes, free_host_bytes
from loraga_dist.ranks.world import World
from loraga_dist.request.request import CheckpointRequest, understand
from loraga_dist.sharding.settings import Holding

MARGIN = 0.1
"""The plan may be off by this share: below 1 - MARGIN of the memory it fits, above 1 + MARGIN it cannot."""

MOST_RANKS = 4096


@dataclass(frozen=True, kw_only=True)
class Forecaster:
    """What a request needs on some number of ranks, under its own settings or under changed ones."""

    request: CheckpointRequest
    world_size: int
    on_host: bool
    """The ranks compute on CPUs."""
    device_bytes: float | None = None
    """Memory of one device, where it is known: `gradient.state_device: auto` depends on it."""
    _activations: dict[Any, Activations | None] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, request: CheckpointRequest, world: World) -> Forecaster:
        """For the ranks and devices at hand."""
        on_host = world.device.type == "cpu"
        device_bytes = None if on_host else free_bytes(world.device, world.ranks_on_node)
        return cls(request=request, world_size=world.size, on_host=on_host, device_bytes=device_bytes)

    @classmethod
    def of_config(cls, config: InitConfig, world_size: int, device: torch.device) -> Forecaster:
        """For ranks and devices that need not be there, from config and headers alone. Raises UserError for what `init`
        would refuse of them."""
        elsewhere = World(0, world_size, 0, device)
        request = understand(config, elsewhere, needs_weights=False, reads_data=False)
        return cls(request=request, world_size=world_size, on_host=device.type == "cpu")

    @property
    def config(self) -> InitConfig:
        return self.request.config

    @cached_property
    def plan(self) -> Plan:
        request, gradient = self.request, self.config.gradient
        names = [target.name for target in request.targets]
        in_pieces = Holding.of(self.config.deepspeed, self.world_size).is_sharded
        order = choose_order(
            gradient.order, request.base.model_class.__name__, request.blocks, names, in_pieces=in_pieces
        )
        return make_plan(request.targets, gradient, request.scheme, self.world_size, order)

    @cached_property
    def setting(self) -> Setting:
        base, holding = self.request.base, Holding.of(self.config.deepspeed, self.world_size)
        # what `StateHome.choose` will do once the weights are on the device
        state_device = self.config.gradient.state_device
        state_on_host = state_device == "host"
        if state_device == "auto" and self.device_bytes is not None:
            weights_bytes = 0 if holding.offloads_weights else self.request.shape.partition_bytes(self.world_size)
            state_on_host = self.plan.state_bytes_per_rank > DEVICE_SHARE * (self.device_bytes - weights_bytes)
        return Setting(
            world_size=self.world_size,
            sharded=holding.is_sharded,
            on_host=self.on_host,
            weights_on_host=holding.offloads_weights,
            weights_mapped=self.on_host
            and not holding.is_sharded
            and all(slot.dtype == base.dtype for slot in base.index.values()),
            state_on_host=not self.on_host and state_on_host,
        )

    def activations(self, shapes: Shapes) -> Activations | None:
        """Of the group whose backward goes deepest: the first, for targets are in module order. Without groups there is
        no backward."""
        names = [matrix.name for matrix in self.plan.groups[0]] if self.plan.groups else []
        base, checkpointing = self.request.base, self.config.gradient.checkpointing

        def observation_bytes(name: str) -> int:
            matrix = self.plan.matrices[name]
            return ENGINES[matrix.engine].observation_bytes(matrix, base.dtype, math.prod(shapes["input_ids"]))

        key = (tuple(shapes.items()), tuple(names), checkpointing, self.setting.sharded)
        if key not in self._activations:
            self._activations[key] = forecast_activations(
                base,
                shapes,
                names,
                loss=LOSSES[self.config.lora.task_type],
                checkpointing=checkpointing,
                gathers=self.setting.sharded,
                sink_bytes=observation_bytes,
            )
        return self._activations[key]

    def memory(self, rank: int, shapes: Shapes) -> RankMemory:
        """What a rank will hold. shapes: of its largest microbatch."""
        return rank_memory(
            rank,
            self.plan,
            self.request.shape,
            self.activations(shapes),
            self.setting,
            num_tokens=math.prod(shapes["input_ids"]),
            scale=self.config.init.scale,
        )

    def worst(self, shapes: Shapes) -> RankMemory:
        """Of the rank that needs most."""
        plan, work = self.plan, [0] * self.world_size
        for target in plan.targets:
            width = plan.matrices[target.name].width if plan.groups else target.r
            work[plan.owners[target.name]] += width * (target.M + target.N)
        scale = self.config.init.scale
        workspace = {target.name: weight_workspace_bytes(plan, scale, target) or 0 for target in plan.targets}
        ranks = {0, work.index(max(work)), plan.owners[max(workspace, key=workspace.__getitem__)]}
        return max((self.memory(rank, shapes) for rank in ranks), key=lambda found: found.peak_bytes)

    @cached_property
    def peak_bytes(self) -> int:
        """Of the rank that needs most, for the largest microbatch that the settings allow."""
        return self.worst(self.largest_allowed()).peak_bytes

    def largest_microbatch(self) -> Shapes:
        """Shapes of this rank's microbatch with most tokens; where no data was read, of the largest there may be."""
        data = self.request.data
        if data is None:
            return self.largest_allowed()
        microbatches = data.microbatches(0, data.num_samples, 0)
        largest = max(microbatches, key=lambda microbatch: microbatch.inputs["input_ids"].numel())
        return {name: tuple(tensor.shape) for name, tensor in largest.inputs.items()}

    def largest_allowed(self) -> Shapes:
        """Of the largest microbatch the settings allow; where none is needed, of the probe that compares logits."""
        calibration, base = self.config.calibration, self.request.base
        length, size = calibration.max_length, min(calibration.per_device_batch_size, calibration.most_samples)
        if self.request.scheme.source != "gradient" and not calibration.names_data:
            length, size = PROBE_TOKENS, 1
        length = min(length, base.max_positions or length)
        labels = (size,) if self.config.lora.task_type == "SEQ_CLS" else (size, length)
        return {"input_ids": (size, length), "attention_mask": (size, length), "labels": labels}

    def changed(self, **sections: dict[str, Any]) -> Forecaster:
        """The same request with some keys changed."""
        update = {name: getattr(self.config, name).model_copy(update=keys) for name, keys in sections.items()}
        return replace(self, request=replace(self.request, config=self.config.model_copy(update=update)))


def verdict(peak_bytes: int, limit_bytes: float) -> str:
    """`fits`, `tight` (the plan is not exact enough to say) or `too large`."""
    if peak_bytes <= (1 - MARGIN) * limit_bytes:
        return "fits"
    return "tight" if peak_bytes <= (1 + MARGIN) * limit_bytes else "too large"


def refuse_what_cannot_fit(planned: RankMemory, forecaster: Forecaster, world: World) -> None:
    """Raise UserError, with advice, where this rank's memory is too small even if the plan is too high by MARGIN."""
    kinds = [(planned.required_bytes, free_bytes(world.device, world.ranks_on_node), "its device")]
    if planned.host:
        kinds.append((planned.host_peak_bytes, free_host_bytes() // world.ranks_on_node, "the host"))
    for needed, free, where in kinds:
        if verdict(needed, free) == "too large":
            changes = ["use more nodes, or fewer ranks on each, or lower gradient.state_budget_gib"]
            if where == "its device":
                changes = advice(forecaster, free)
            raise UserError(
                "model.name_or_path",
                forecaster.config.model.name_or_path,
                f"needs {_gib(needed)} GiB on rank {world.rank}, {where} has {_gib(free)} GiB free; "
                + "; ".join(changes),
            )


def advice(forecaster: Forecaster, limit_bytes: float) -> list[str]:
    """What to change where a plan does not fit, with the peak each change leads to; where it fits, what is faster."""

    def judged(peak_bytes: int) -> str:
        return f"{_gib(peak_bytes)} GiB ({verdict(peak_bytes, limit_bytes)})"

    now, world_size = forecaster.peak_bytes, forecaster.world_size
    if verdict(now, limit_bytes) == "fits":
        return _fewer_sweeps(forecaster, limit_bytes)
    lines = []
    if not forecaster.on_host or world_size > 1:
        lines.append(_ranks_that_fit(forecaster, limit_bytes))
    all_changes: dict[str, dict[str, Any]] = {}
    for text, section, keys in _changes(forecaster.config):
        peak = forecaster.changed(**{section: keys}).peak_bytes
        if peak < 0.99 * now:
            lines.append(f"{text}: {judged(peak)}")
            all_changes[section] = all_changes.get(section, {}) | keys
    if sum(map(len, all_changes.values())) > 1:
        together = forecaster.changed(**all_changes)
        lines.append(f"all of these: {judged(together.peak_bytes)}")
        if verdict(together.peak_bytes, limit_bytes) != "fits":
            lines.append(f"with all of these, {_ranks_that_fit(together, limit_bytes)}")
    if not forecaster.on_host and not forecaster.setting.weights_on_host and world_size > 1:
        weights = forecaster.request.shape.partition_bytes(world_size)
        lines.append(
            f"deepspeed: configs/deepspeed/zero3_offload_cpu.json moves {_gib(weights)} GiB of weights per rank to the "
            f"host: {judged(now - weights)}"
        )
    return lines


def _fewer_sweeps(forecaster: Forecaster, limit_bytes: float) -> list[str]:
    """The smallest budget with which one sweep over the data does, or else half of the sweeps, if that fits."""
    sweeps = forecaster.plan.groups
    if not sweeps:
        return []
    everything = sum(Plan.state_bytes(sweep) for sweep in sweeps) / 2**30
    for wanted in sorted({1, -(-len(sweeps) // 2)} - {len(sweeps)}):
        budget = math.ceil(10.5 * everything / wanted) / 10
        changed = forecaster.changed(gradient={"state_budget_gib": budget})
        peak, count = changed.peak_bytes, len(changed.plan.groups)
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


def _ranks_that_fit(forecaster: Forecaster, limit_bytes: float) -> str:
    """The fewest ranks that hold the plan, by bisection: more ranks never need more each."""

    def peak_bytes(world_size: int) -> int:
        return replace(forecaster, world_size=world_size).peak_bytes

    low, high = forecaster.world_size, MOST_RANKS
    if verdict(peak_bytes(high), limit_bytes) != "fits":
        return f"no number of ranks up to {MOST_RANKS} fits: what a rank holds beside its weights is too much"
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if verdict(peak_bytes(middle), limit_bytes) == "fits" else (middle, high)
    return f"{high} ranks fit: {_gib(peak_bytes(high))} GiB each"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f}"
