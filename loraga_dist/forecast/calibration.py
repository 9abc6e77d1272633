"""What calibration holds on one rank from moment to moment, in either order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from loraga_dist.artifacts.names import FACTORS
from loraga_dist.config import GradientConfig
from loraga_dist.engines import ENGINES, Matrix
from loraga_dist.forecast.activations import Activations
from loraga_dist.forecast.in_blocks import InBlocks
from loraga_dist.gradients.kept import Keeping
from loraga_dist.gradients.passes import chunk_end
from loraga_dist.model.plan import Plan, sweep_end
from loraga_dist.model.shape import ModelShape

Parts = dict[str, int]
"""Bytes by what they hold."""

Moments = dict[str, list[tuple[Parts, Parts]]]
"""By phase: what is held on the device, and what on the host."""

KEPT_INPUTS = "inputs of blocks"
CHECKPOINTS = "checkpoints"
ARGUMENTS = "their arguments"
BETWEEN = "gradients between blocks"
STATE = "engine state"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a plan is to run."""

    world_size: int
    sharded: bool
    on_host: bool
    """The ranks compute on CPUs: what else lies on the host is in the same memory."""
    weights_on_host: bool
    """ZeRO-3 keeps the shards there (offload_param)."""
    weights_mapped: bool
    """A single process maps them from the checkpoint's files, until they are changed."""
    from_disk: bool
    """A single process reads them from there, a piece at a time."""
    state_limit_bytes: float
    """The engine state of a sweep that is larger lives there, beside a device that computes (gradient.state_device)."""

    @property
    def gathers(self) -> bool:
        """Pieces of the model are copied to where they compute."""
        return self.sharded or self.from_disk and not self.on_host


@dataclass(frozen=True, kw_only=True)
class Course:
    """How calibration goes through the microbatches of a rank."""

    num_microbatches: int
    most_tokens: int
    """In one."""
    chunk: int
    """How many are on their way together."""
    in_files: bool
    """What is kept between blocks is."""
    sweeps: Sequence[Sequence[Sequence[Matrix]]]
    """Groups whose state is there at the same time; one after the other."""
    looks: bool
    """The first sweep's first pass stops now and then, to see whether it was data enough."""

    @property
    def num_chunks(self) -> int:
        """In a pass over the data."""
        return -(-self.num_microbatches // self.chunk)

    @cached_property
    def num_first_chunks(self) -> int:
        """In the first pass of all."""
        count = end = 0
        while end < self.num_microbatches:
            end = chunk_end(end, self.num_microbatches, self.chunk, at_looks=self.looks)
            count += 1
        return count

    @property
    def state_bytes(self) -> int:
        """Engine state every rank holds during the largest sweep."""
        return max((sum(map(Plan.state_bytes, sweep)) for sweep in self.sweeps), default=0)

    def checkpoint_bytes(self, output_bytes: Mapping[str, int], num_states: int) -> int:
        """On the disk: what is finished, and some states of all ranks. output_bytes: by part."""
        return output_bytes[FACTORS] + num_states * self.state_bytes

    @classmethod
    def of(
        cls,
        plan: Plan,
        gradient: GradientConfig,
        keeping: Keeping,
        *,
        num_microbatches: int,
        most_tokens: int,
        looks: bool,
    ) -> Course:
        """looks: as `sweep_end` takes it."""
        chunk = (
            1 if plan.order.blocks is None else min(keeping.chunk_microbatches or num_microbatches, num_microbatches)
        )
        sweeps, first = [], 0
        while first < len(plan.groups):
            end = sweep_end(plan, gradient, first, in_one_chunk=chunk >= num_microbatches, looks=looks)
            sweeps.append(plan.groups[first:end])
            first = end
        return cls(
            num_microbatches=num_microbatches,
            most_tokens=most_tokens,
            chunk=chunk,
            in_files=keeping.directory is not None,
            sweeps=sweeps,
            looks=looks,
        )


@dataclass(frozen=True, kw_only=True)
class _State:
    """Bytes that the engines of some groups hold on a rank."""

    held: int
    cold: int
    """At the end of the first microbatch."""
    visiting: int
    """Of a single target: what is on the device at a time, where state lives on the host."""
    refresh: int
    """For a moment, of an owner."""
    factorization: int
    """The same."""

    @classmethod
    def of(cls, groups: Sequence[Sequence[Matrix]], rank: int, dtype: torch.dtype, num_tokens: int) -> _State:
        pairs = [(ENGINES[matrix.engine], matrix) for group in groups for matrix in group]
        owned = [(engine, matrix) for engine, matrix in pairs if matrix.owner == rank]
        refresh = max(
            (engine.refresh_bytes([matrix for its, matrix in owned if its is engine]) for engine in dict(owned)),
            default=0,
        )
        moments = sum(matrix.moment_bytes for _, matrix in pairs)
        return cls(
            held=moments
            + sum(engine.held_bytes(matrix, dtype, owned=matrix.owner == rank) for engine, matrix in pairs),
            cold=moments
            + sum(engine.cold_bytes(matrix, dtype, matrix.expected_rows(num_tokens)) for engine, matrix in pairs),
            visiting=max(
                engine.held_bytes(matrix, dtype, owned=True) + matrix.moment_bytes for engine, matrix in pairs
            ),
            refresh=refresh,
            # the factor of an input stays for the next matrix that has it
            factorization=max((max(engine.factorization_bytes(matrix), refresh) for engine, matrix in owned), default=0)
            + max((matrix.regression_bytes for _, matrix in owned), default=0),
        )


class _Log:
    """Moments as they are told, on one rank."""

    def __init__(self, setting: Setting) -> None:
        self._limit_bytes = setting.state_limit_bytes
        self._on_host = False
        self.moments: Moments = defaultdict(list)
        self.triplets = 0
        """Bytes of what has been found so far and is owned."""

    def add(self, phase: str, on_device: Parts, state: tuple[int, int], on_host: Parts | None = None) -> None:
        """state: bytes in all, and of what visits the device where the rest lives on the host."""
        on_host = (on_host or {}) | {"owned triplets": self.triplets}
        held, visiting = state
        if self._on_host:
            self.moments[phase].append((on_device | {STATE: visiting}, on_host | {STATE: held}))
        else:
            self.moments[phase].append((on_device | {STATE: held}, on_host))

    def begin(self, sweep: Sequence[Sequence[Matrix]]) -> None:
        self._on_host = sum(map(Plan.state_bytes, sweep)) > self._limit_bytes

    def found(self, group: Sequence[Matrix], rank: int) -> None:
        self.triplets += sum(matrix.triplet_bytes for matrix in group if matrix.owner == rank)


def moments(
    rank: int, plan: Plan, shape: ModelShape, activations: Activations | None, setting: Setting, course: Course
) -> Moments:
    """All that counts, of the phases of calibration and of `factorize`. Activations that are None count as nothing."""
    log = _Log(setting)
    if plan.order.blocks is None:
        _in_model_order(log, rank, shape, activations, setting, course)
    else:
        _in_block_order(log, rank, plan, shape, activations and activations.in_blocks, setting, course)
    return log.moments


def _in_model_order(
    log: _Log, rank: int, shape: ModelShape, activations: Activations | None, setting: Setting, course: Course
) -> None:
    gathered = shape.largest_module_numel * shape.num_bytes_each if setting.sharded else 0
    backward = gathered if activations is None else activations.backward_bytes
    for sweep in course.sweeps:
        log.begin(sweep)
        state = _State.of(sweep, rank, shape.dtype, course.most_tokens)
        held = state.held, state.visiting
        log.add("calibrate", {"microbatch": backward}, held)
        log.add("calibrate", {"workspace": state.refresh}, held)
        log.add("calibrate", {"workspace": gathered}, (state.cold, state.visiting))
        log.add("factorize", {"workspace": state.factorization}, held)
        for group in sweep:
            log.found(group, rank)


def _in_block_order(
    log: _Log,
    rank: int,
    plan: Plan,
    shape: ModelShape,
    found: InBlocks | None,
    setting: Setting,
    course: Course,
) -> None:
    num_groups, top = len(plan.groups), len(shape.numels_of_blocks)
    if found is None:
        found = InBlocks(
            hidden_bytes=0, argument_bytes=0, forward_bytes=0, loss_bytes=0, backward_bytes=(0,) * num_groups
        )
    outside = shape.outside_numel * shape.num_bytes_each if setting.gathers else 0
    block = shape.largest_block_numel * shape.num_bytes_each if setting.gathers else 0
    # beside a device that computes, what is kept waits on the host
    visiting = 0 if setting.on_host else found.hidden_bytes + found.argument_bytes
    chunk, backward_bytes = course.chunk, iter(found.backward_bytes)
    lowest = min((plan.order.stage_of(group[0].name) for group in plan.groups), default=top)

    def kept(stage: int) -> Parts:
        in_memory = 0 if course.in_files else chunk * (stage + 1) * found.kept_bytes(on_host=setting.on_host)
        return {KEPT_INPUTS: in_memory, ARGUMENTS: chunk * found.argument_bytes}

    for number, sweep in enumerate(course.sweeps):
        log.begin(sweep)
        all_states = _State.of(sweep, rank, shape.dtype, course.most_tokens)
        num_chunks = course.num_chunks if number else course.num_first_chunks
        if number == 0 or num_chunks > 1:
            # before the first chunk an engine may have some of its state, before later ones it has all
            before = (all_states.held if num_chunks > 1 else all_states.cold), 0
            forward = {"gathered": outside + block, "microbatch": found.forward_bytes + visiting}
            leaving = {"gathered": outside, "microbatch": found.loss_bytes + visiting}
            log.add("forward", forward, before, kept(top))
            log.add("loss", leaving | {BETWEEN: (chunk - 1) * found.hidden_bytes}, before, kept(top))
        for at, group in enumerate(sweep):
            stage, backward = plan.order.stage_of(group[0].name), next(backward_bytes)
            own, left, held = all_states, all_states.held, all_states.held
            if len(sweep) > 1:
                own = _State.of([group], rank, shape.dtype, course.most_tokens)
                left = _State.of(sweep[at:], rank, shape.dtype, course.most_tokens).held
            gathered = {"gathered": outside if stage == top else block}
            between = {BETWEEN: (chunk if stage in (top, lowest) else 2 * chunk) * found.hidden_bytes}
            fewer = {BETWEEN: between[BETWEEN] - (0 if stage == lowest else found.hidden_bytes)}
            shown = {"microbatch": backward + visiting}
            log.add("backward", gathered | fewer | shown, (held, own.visiting), kept(stage))
            for phase, workspace, num_bytes in (
                ("backward", own.refresh, held),
                ("backward", 0, held - own.held + own.cold),
                ("factorize", own.factorization, left),
            ):
                log.add(phase, gathered | between | {"workspace": workspace}, (num_bytes, own.visiting), kept(stage))
        for group in sweep:
            log.found(group, rank)
