"""From a request to what it will take, and which way through the model fits; no weights are read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from loraga_dist.config import GradientConfig, InitConfig
from loraga_dist.data.losses import LOSSES
from loraga_dist.data.microbatches import PROBE_TOKENS
from loraga_dist.engines import ENGINES, Matrix
from loraga_dist.engines.home import DEVICE_SHARE
from loraga_dist.errors import UserError
from loraga_dist.forecast.activations import Activations, forecast_activations
from loraga_dist.forecast.calibration import Course, Setting
from loraga_dist.forecast.in_blocks import InBlocks, Shown
from loraga_dist.forecast.ledger import Shapes
from loraga_dist.forecast.memory import RankMemory, rank_memory, weight_workspace_bytes
from loraga_dist.forecast.ways import MARGIN, Room, Way, verdict, ways
from loraga_dist.gradients.kept import FreeSpace, Keeping, choose_keeping
from loraga_dist.model.plan import Plan, make_plan
from loraga_dist.model.shape import within_positions
from loraga_dist.ranks.memory import free_bytes
from loraga_dist.ranks.world import World
from loraga_dist.request.request import CheckpointRequest, understand
from loraga_dist.sharding.settings import Holding

_ALIKE = 0.02
"""Of a peak: less by no more than this makes up for no traffic."""


@dataclass(frozen=True, kw_only=True)
class Forecaster:
    """What a request needs on some number of ranks, under its own settings or changed ones, one way or another."""

    request: CheckpointRequest
    world_size: int
    on_host: bool
    """The ranks compute on CPUs."""
    device_bytes: float | None = None
    """Memory of one device, where it is known: `gradient.state_device: auto` depends on it."""
    chosen: Way | None = None
    """None for the cheapest, as if there were room for everything."""
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
    def way(self) -> Way:
        return self.chosen or next(self.ways())

    def ways(self) -> Iterator[Way]:
        """All that the settings allow, in order of cost."""
        return ways(self.request, self.world_size)

    @property
    def files_directory(self) -> Path:
        """What takes the inputs of blocks that memory has no room for."""
        named = self.config.gradient.activations_dir
        return Path(named) if named else Path(self.config.output.dir).parent

    def fitting(self, room: Room, shapes: Shapes | None = None) -> Forecaster:
        """The first way that fits there, with what it keeps where; else the first that needs least, or hardly more.

        shapes: of the largest microbatch of all ranks; by default the largest that the settings allow. The same
        arguments lead to the same way.

        Raises UserError where no way can keep a microbatch, or only another way than the user wrote.
        """
        shapes = shapes or self.largest_allowed()
        found: list[tuple[int, Forecaster]] = []
        refused: UserError | None = None
        device_bytes = None if self.on_host else room.device_bytes
        for way in self.ways():
            asked = replace(self, chosen=way, device_bytes=device_bytes)
            try:
                for keeping in asked._keepings(room, shapes):
                    candidate = replace(asked, chosen=replace(way, keeping=keeping))
                    peak_bytes = candidate.worst(shapes).peak_bytes
                    if verdict(peak_bytes, room.device_bytes) == "fits":
                        return candidate
                    found.append((peak_bytes, candidate))
            except UserError as error:
                refused = error
        if not found:
            assert refused is not None, "there is a way, or none was allowed"
            raise refused
        least_bytes = min(peak_bytes for peak_bytes, _ in found)
        return next(candidate for peak_bytes, candidate in found if peak_bytes <= (1 + _ALIKE) * least_bytes)

    def _keepings(self, room: Room, shapes: Shapes) -> Iterator[Keeping]:
        """All on its way together, by what a single microbatch leaves free, or some, with the state of whole sweeps.

        All may have room all the same: on a device that saves traffic, and in files it may take least.
        """
        activations, gradient = self.activations(shapes), self.config.gradient
        if activations is None or activations.in_blocks is None:
            yield Keeping()
            return
        first = self.worst(shapes, num_microbatches=1), activations.in_blocks
        keeping = self._keeping_beside(*first, room, shapes, gradient)
        if keeping.chunk_microbatches is None:
            yield keeping
            return
        whatever, is_free = replace(room, device_bytes=None), gradient.chunk_microbatches == "auto"
        if is_free and not self.on_host:
            yield self._keeping_beside(*first, whatever, shapes, gradient)
        one = replace(self, chosen=replace(self.way, keeping=Keeping(chunk_microbatches=1)))
        yield self._keeping_beside(one.worst(shapes), activations.in_blocks, room, shapes, gradient)
        if is_free and self.on_host:
            in_files = gradient.model_copy(update={"activations_dir": str(self.files_directory)})
            yield self._keeping_beside(*first, whatever, shapes, in_files)

    def _keeping_beside(
        self, memory: RankMemory, found: InBlocks, room: Room, shapes: Shapes, gradient: GradientConfig
    ) -> Keeping:
        """memory: with one microbatch on its way."""

        def left(limit_bytes: float | None, taken_bytes: int) -> float | None:
            return None if limit_bytes is None else max(0.0, (1 - MARGIN) * limit_bytes - taken_bytes)

        between, on_device = 2 * found.hidden_bytes, None
        if self.on_host:
            free = left(room.device_bytes, memory.peak_bytes)
        else:
            free = left(room.host_bytes, memory.host_peak_bytes)
            on_device = left(room.device_bytes, memory.peak_bytes)
        return choose_keeping(
            kept_bytes=(len(self.request.shape.numels_of_blocks) + 1) * found.kept_bytes(on_host=self.on_host),
            resident_bytes=found.argument_bytes + (between if self.on_host else 0),
            between_bytes=between,
            num_microbatches=self.num_microbatches(shapes),
            free=FreeSpace(
                memory_bytes=free,
                files_bytes=room.files_bytes,
                device_bytes=on_device,
                directory=self.files_directory,
                beside_one=True,
            ),
            gradient=gradient,
        )

    def num_microbatches(self, shapes: Shapes) -> int:
        """Of each rank."""
        if not self.plan.groups:
            return 0
        if (data := self.request.data) is not None:
            return -(-data.num_samples // (self.world_size * data.per_device_batch_size))
        return -(-self.config.calibration.most_samples // (self.world_size * shapes["input_ids"][0]))

    @cached_property
    def plan(self) -> Plan:
        request = self.request
        return make_plan(request.targets, self.config, self.world_size, self.way.order, request.amount)

    @cached_property
    def setting(self) -> Setting:
        base, holding = self.request.base, Holding.of(self.config.deepspeed, self.world_size)
        # what `StateHome.choose` will do once the weights are on the device
        state_device = self.config.gradient.state_device
        state_limit_bytes = 0.0 if state_device == "host" and not self.on_host else math.inf
        if state_device == "auto" and self.device_bytes is not None and not self.on_host:
            on_host = holding.offloads_weights or self.way.from_disk
            weights_bytes = 0 if on_host else self.request.shape.partition_bytes(self.world_size)
            state_limit_bytes = DEVICE_SHARE * (self.device_bytes - weights_bytes)
        return Setting(
            world_size=self.world_size,
            sharded=holding.is_sharded,
            on_host=self.on_host,
            weights_on_host=holding.offloads_weights,
            weights_mapped=self.on_host
            and not holding.is_sharded
            and not self.way.from_disk
            and all(slot.dtype == base.dtype for slot in base.index.values()),
            from_disk=self.way.from_disk,
            state_limit_bytes=state_limit_bytes,
        )

    def activations(self, shapes: Shapes) -> Activations | None:
        base, plan, checkpointing = self.request.base, self.plan, self.way.checkpointing

        def shown(group: list[Matrix]) -> Shown:
            num_tokens = math.prod(shapes["input_ids"])
            return Shown(
                tuple(
                    (
                        matrix.name,
                        ENGINES[matrix.engine].observation_bytes(matrix, base.dtype, num_tokens)
                        + matrix.input_bytes(num_tokens),
                    )
                    for matrix in group
                )
            )

        groups = tuple(map(shown, plan.groups if plan.order.blocks else plan.groups[:1]))
        key = (tuple(shapes.items()), groups, plan.order.name, checkpointing, self.setting.gathers)
        if key not in self._activations:
            self._activations[key] = forecast_activations(
                base,
                shapes,
                groups,
                plan.order,
                loss=LOSSES[self.config.lora.task_type],
                checkpointing=checkpointing,
                gathers=self.setting.gathers,
            )
        return self._activations[key]

    def course(self, shapes: Shapes, num_microbatches: int | None = None) -> Course:
        """shapes: of the largest microbatch. num_microbatches: by default all."""
        return Course.of(
            self.plan,
            self.config.gradient,
            self.way.keeping,
            num_microbatches=num_microbatches or self.num_microbatches(shapes),
            most_tokens=math.prod(shapes["input_ids"]),
            looks=self.request.target_cosine is not None,
        )

    def memory(self, rank: int, shapes: Shapes, num_microbatches: int | None = None) -> RankMemory:
        """What a rank will hold. shapes: of its largest microbatch. num_microbatches: by default all."""
        return rank_memory(
            rank,
            self.plan,
            self.request.shape,
            self.activations(shapes),
            self.setting,
            self.course(shapes, num_microbatches),
            scale=self.config.init.scale,
        )

    def worst(self, shapes: Shapes, num_microbatches: int | None = None) -> RankMemory:
        """Of the rank that needs most."""
        plan, work = self.plan, [0] * self.world_size
        for target in plan.targets:
            width = plan.matrices[target.name].num_kept if plan.groups else target.r
            work[plan.owners[target.name]] += width * (target.M + target.N)
        scale = self.config.init.scale
        workspace = {target.name: weight_workspace_bytes(plan, scale, target) or 0 for target in plan.targets}
        ranks = {0, work.index(max(work)), plan.owners[max(workspace, key=workspace.__getitem__)]}
        return max((self.memory(rank, shapes, num_microbatches) for rank in ranks), key=lambda found: found.peak_bytes)

    @cached_property
    def peak_bytes(self) -> int:
        """Of the rank that needs most, for the largest microbatch that the settings allow."""
        return self.worst(self.largest_allowed()).peak_bytes

    @cached_property
    def largest_microbatch(self) -> Shapes:
        """Shapes of this rank's microbatch with most tokens; where no data was read, of the largest there may be."""
        data = self.request.data
        if data is None:
            return self.largest_allowed()
        both = (data, self.request.step_data) if self.request.step_data else (data,)
        microbatches = [each for part in both for each in part.microbatches(0, part.num_samples, 0)]
        largest = max(microbatches, key=lambda microbatch: microbatch.inputs["input_ids"].numel())
        return {name: tuple(tensor.shape) for name, tensor in largest.inputs.items()}

    def largest_allowed(self) -> Shapes:
        """Of the largest microbatch the settings allow; where none is needed, of the probe that compares logits."""
        calibration = self.config.calibration
        length, size = calibration.max_length, min(calibration.per_device_batch_size, calibration.most_samples)
        if self.request.scheme.source != "gradient" and not calibration.names_data:
            length, size = PROBE_TOKENS, 1
        length = within_positions(self.request.shape.max_positions, length)
        labels = (size,) if self.config.lora.task_type == "SEQ_CLS" else (size, length)
        return {"input_ids": (size, length), "attention_mask": (size, length), "labels": labels}

    def changed(self, **sections: dict[str, Any]) -> Forecaster:
        """The same request with some keys changed, and no way chosen."""
        return replace(self, request=self.request.with_keys(**sections), chosen=None)

    def peak_within(self, limit_bytes: float, **changes: int) -> float:
        """Of the way that fits there, without end where the user's settings allow none; changes: to this forecaster."""
        try:
            return replace(self, chosen=None, **changes).fitting(Room(device_bytes=limit_bytes)).peak_bytes
        except UserError:
            return math.inf
