"""`loraga-dist plan`: what a request will take, as one value and as a JSON object."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from loraga_dist.artifacts.layout import Layout
from loraga_dist.data.microbatches import num_kept_apart
from loraga_dist.files.checkpoint import GENERATIONS
from loraga_dist.forecast.advice import advice
from loraga_dist.forecast.calibration import CHECKPOINTS, KEPT_INPUTS, Course
from loraga_dist.forecast.forecaster import Forecaster
from loraga_dist.forecast.kinds import Kind, experts_line, few_tokens, kinds_of
from loraga_dist.forecast.ledger import Shapes
from loraga_dist.forecast.memory import RankMemory
from loraga_dist.forecast.speed import measured_tflops
from loraga_dist.forecast.ways import Room, Way, verdict
from loraga_dist.forecast.work import DataTaken, Search, Work, work
from loraga_dist.gradients.passes import num_refine_passes
from loraga_dist.model.plan import Plan
from loraga_dist.model.rank_budget import num_parameters
from loraga_dist.model.targets import Target

UTILISATION = (0.5, 0.2)
"""Shares of a device's peak flops between which the time range is drawn."""

MEASURED_UTILISATION = (1.0, 0.4)
"""The same of a measured product: what is not a product (docs/BENCHMARKS.md) takes the rest."""

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """Everything the plan says; what it asks the forecaster for is asked once. Memory is of the rank that needs most.

    forecaster: where no way is chosen, the plan is for the one that fits `gib_per_rank`.
    shapes, num_sequences, num_tokens: of the calibration data where it has been read; else the most that the config
    allows.
    link_gbps: what a rank receives, in 10^9 bits a second.
    """

    forecaster: Forecaster
    shapes: Shapes | None = None
    num_sequences: int | None = None
    num_tokens: int | None = None
    gib_per_rank: float | None = None
    device_tflops: float | None = None
    link_gbps: float | None = None

    @cached_property
    def fitted(self) -> Forecaster:
        """On the way that is taken."""
        if self.forecaster.chosen is not None:
            return self.forecaster
        return self.forecaster.fitting(Room(device_bytes=self.limit_bytes), self.largest)

    @property
    def limit_bytes(self) -> float | None:
        return None if self.gib_per_rank is None else self.gib_per_rank * _GIB

    @property
    def way(self) -> Way:
        return self.fitted.way

    @property
    def plan(self) -> Plan:
        return self.fitted.plan

    @cached_property
    def largest(self) -> Shapes:
        """Of the largest microbatch."""
        return self.shapes or self.forecaster.largest_allowed()

    @cached_property
    def memory(self) -> RankMemory:
        return self.fitted.worst(self.largest)

    @cached_property
    def peak_bytes_by_way(self) -> dict[str, int]:
        """Of all ways that the settings allow, if everything is kept."""
        candidates = (replace(self.fitted, chosen=way) for way in self.fitted.ways())
        return {each.way.title: each.worst(self.largest).peak_bytes for each in candidates} | {
            self.way.title: self.memory.peak_bytes
        }

    @cached_property
    def course(self) -> Course:
        return self.fitted.course(self.largest)

    @cached_property
    def kept_bytes(self) -> int:
        """Inputs of blocks, of a rank."""
        activations = self.fitted.activations(self.largest)
        if activations is None or activations.in_blocks is None:
            return 0
        in_blocks, num_kept = activations.in_blocks, len(self.fitted.request.shape.numels_of_blocks) + 1
        in_files = self.way.keeping.directory is not None
        each = in_blocks.hidden_bytes if in_files else in_blocks.kept_bytes(on_host=self.fitted.on_host)
        return self.course.chunk * num_kept * each

    @property
    def num_sweeps(self) -> int:
        """How often the data goes through the model from its start, and back."""
        if self.plan.order.blocks is None or self.course.num_chunks > 1:
            return len(self.course.sweeps)
        return min(1, len(self.plan.groups))

    @property
    def num_used(self) -> int:
        """Sequences."""
        most = self.forecaster.config.calibration.most_samples
        return (self.num_sequences or most) if self.plan.groups else 0

    @property
    def sequences_per_microbatch(self) -> int:
        return self.largest["input_ids"][0]

    @property
    def tokens_per_sequence(self) -> int:
        return self.largest["input_ids"][1]

    @property
    def microbatches_per_rank(self) -> int:
        return self.forecaster.num_microbatches(self.largest)

    @property
    def all_tokens(self) -> int:
        return self.num_tokens or self.num_used * self.tokens_per_sequence

    @property
    def experts(self) -> str | None:
        return experts_line(self.kinds, self.all_tokens)

    @property
    def unseen(self) -> list[str]:
        return few_tokens(self.kinds, self.all_tokens, self.plan.scheme) if self.plan.groups else []

    @property
    def refine_passes(self) -> int:
        """With `auto` those of the data, if it has been read; else none, as of long texts."""
        data = self.forecaster.request.data
        tokens = math.inf if data is None else data.num_supervised_tokens / max(1, self.microbatches_per_rank)
        return num_refine_passes(self.forecaster.config.gradient, self.plan, tokens)

    @property
    def search(self) -> Search | None:
        """For the length of a step."""
        request = self.forecaster.request
        if not request.config.init.searches_step:
            return None
        if (data := request.step_data) is not None:
            num_samples, num_tokens = data.num_samples, data.num_tokens
        else:
            num_samples = num_kept_apart(self.num_used)
            num_tokens = num_samples * self.tokens_per_sequence
        return Search(num_tokens, -(-num_samples // (self.forecaster.world_size * self.sequences_per_microbatch)))

    @cached_property
    def work(self) -> Work:
        return work(
            self.plan,
            self.forecaster.request.shape,
            self.fitted.setting,
            self.course,
            DataTaken(
                num_tokens=self.all_tokens,
                refine_passes=self.refine_passes,
                moment_share=self.forecaster.request.moment_share,
                search=self.search,
            ),
            recomputes=self.way.checkpointing != "none",
        )

    @property
    def link_seconds(self) -> float | None:
        """Of receiving alone; None where the link is not known."""
        if self.link_gbps is None:
            return None
        return sum(self.work.traffic_bytes_per_rank.values()) * 8 / (self.link_gbps * 1e9)

    @property
    def is_measured(self) -> bool:
        """The speed is that of this machine's processors: the plan is for CPUs, and nothing else was said."""
        return self.device_tflops is None and self.forecaster.on_host

    @cached_property
    def tflops_per_rank(self) -> float | None:
        if not self.is_measured:
            return self.device_tflops
        largest = max(self.plan.targets, key=lambda target: target.M * target.N)
        num_tokens = self.sequences_per_microbatch * self.tokens_per_sequence
        return measured_tflops(largest, num_tokens, self.forecaster.request.base.dtype, self.forecaster.world_size)

    @property
    def shares(self) -> tuple[float, float]:
        return MEASURED_UTILISATION if self.is_measured else UTILISATION

    @property
    def seconds(self) -> dict[str, float | bool] | None:
        """Of arithmetic; None where the devices are not known."""
        if self.tflops_per_rank is None:
            return None
        flops, peak = sum(self.work.flops.values()), self.forecaster.world_size * self.tflops_per_rank * 1e12
        at_least, at_most = (flops / (peak * share) for share in self.shares)
        return {
            "at_least": at_least,
            "at_most": at_most,
            "device_tflops": self.tflops_per_rank,
            "measured": self.is_measured,
        }

    @cached_property
    def kinds(self) -> dict[Kind, int]:
        """How many targets there are of each kind."""
        return kinds_of(self.plan)

    @property
    def owned(self) -> list[list[Target]]:
        """By rank."""
        return [self.plan.owned(rank) for rank in range(self.forecaster.world_size)]

    @property
    def busiest_to_mean(self) -> float:
        """The most factorization work of a rank."""
        costs = [sum(self.plan.costs[target.name] for target in mine) for mine in self.owned]
        return max(costs) * len(costs) / sum(costs)

    @property
    def budget(self) -> dict[str, int] | None:
        """Adapter parameters: those wanted, and what they were had every target its largest rank."""
        budget = self.forecaster.config.init.rank_budget
        return None if budget is None else {"parameters": budget, "at_largest_ranks": num_parameters(self.plan.targets)}

    @property
    def disk_bytes(self) -> dict[str, int]:
        """Of the output; while it is made, of its checkpoints, and of what calibration keeps in files."""
        output = Layout.of(self.forecaster.request).num_bytes
        kept = self.kept_bytes if self.way.keeping.directory else 0
        checkpoints = self.course.checkpoint_bytes(output, num_states=GENERATIONS + 1)  # one is being written
        return output | {CHECKPOINTS: checkpoints, KEPT_INPUTS: kept}

    @property
    def dtype(self) -> str:
        return str(self.forecaster.request.base.dtype).removeprefix("torch.")

    @property
    def verdict(self) -> str | None:
        return None if self.limit_bytes is None else verdict(self.memory.peak_bytes, self.limit_bytes)

    @cached_property
    def advice(self) -> list[str]:
        return [] if self.limit_bytes is None else advice(self.fitted, self.limit_bytes)

    def as_json(self) -> dict[str, Any]:
        """Sizes are bytes."""
        config, plan, memory = self.forecaster.config, self.plan, self.memory
        base, shape = self.forecaster.request.base, self.forecaster.request.shape
        return {
            "scheme": config.init.scheme,
            "model": {
                "name_or_path": config.model.name_or_path,
                "class": base.model_class.__name__,
                "parameters": sum(shape.numels),
                "dtype": self.dtype,
                "bytes": shape.num_bytes,
                "quantization": base.quantization and base.quantization["quant_method"],
                "file_bytes": sum(slot.num_bytes for slot in base.index.values()),
                "from_config_alone": not base.index,
            },
            "ranks": self.forecaster.world_size,
            "device": "cpu" if self.forecaster.on_host else "cuda",
            "calibration": {
                "data_read": self.shapes is not None,
                "sequences": self.num_used,
                "tokens_per_sequence": self.tokens_per_sequence,
                "sequences_per_microbatch": self.sequences_per_microbatch,
                "microbatches_per_rank": self.microbatches_per_rank,
                "refine_passes": config.gradient.refine_passes,
            },
            "coverage": asdict(self.forecaster.request.coverage),
            "targets": [
                kind._asdict() | {"count": count, "tokens_each": kind.tokens_each(self.all_tokens)}
                for kind, count in self.kinds.items()
            ],
            "owners": {"targets_per_rank": [len(mine) for mine in self.owned], "busiest_to_mean": self.busiest_to_mean},
            "rank_budget": self.budget,
            "order": {
                "name": plan.order.name,
                "why": plan.order.why,
                "from_disk": self.way.from_disk,
                "checkpointing": self.way.checkpointing if plan.order.blocks is None else None,
                "microbatches_together": self.course.chunk if plan.groups else None,
                "kept_bytes": self.kept_bytes,
                "kept_in": None if self.way.keeping.directory is None else str(self.way.keeping.directory),
            },
            "sweeps": {"count": self.num_sweeps},
            "groups": {
                "count": len(plan.groups),
                "targets": [len(group) for group in plan.groups],
                "state_bytes": [plan.state_bytes(group) for group in plan.groups],
            },
            "memory_per_rank": {
                "peak_bytes": memory.peak_bytes,
                "peak_phase": memory.peak_phase,
                "host_peak_bytes": memory.host_peak_bytes,
                "peak_bytes_by_way": self.peak_bytes_by_way,
                "partition_bytes": shape.partition_bytes(self.forecaster.world_size),
                "largest_gathered_module_bytes": shape.largest_module_numel * shape.num_bytes_each,
                "activations_known": memory.activations_known,
                "device_bytes": memory.device,
                "host_bytes": memory.host,
            },
            "disk_bytes": self.disk_bytes,
            "traffic_bytes_per_rank": self.work.traffic_bytes_per_rank,
            "flops": self.work.flops,
            "seconds": self.seconds,
            "link_seconds": self.link_seconds,
            "gib_per_rank": self.gib_per_rank,
            "verdict": self.verdict,
            "advice": self.advice,
        }
