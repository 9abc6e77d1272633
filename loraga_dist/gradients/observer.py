"""What stands between the taps and an engine: it sees that every target takes part, and that all is finite."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from loraga_dist.config import LoraSection
from loraga_dist.data.microbatches import Microbatch, counted_rows
from loraga_dist.engines.group import EngineGroup
from loraga_dist.errors import RunError, UserError
from loraga_dist.gradients.forward import first_nonfinite_module
from loraga_dist.model.blocks import pieces_of
from loraga_dist.model.names import is_named, to_leave_out
from loraga_dist.ranks.world import World
from loraga_dist.sharding.base import Sharding


@dataclass(frozen=True)
class LossTotals:
    """The loss, the supervised tokens and what the loss is divided by, of all ranks' microbatches."""

    loss_sum: float = 0.0
    num_tokens: int = 0
    num_terms: int = 0

    def __add__(self, other: LossTotals) -> LossTotals:
        num_tokens, num_terms = self.num_tokens + other.num_tokens, self.num_terms + other.num_terms
        return LossTotals(self.loss_sum + other.loss_sum, num_tokens, num_terms)


class NotFinite(Exception):
    """The loss or a gradient of a microbatch, on some rank; on all ranks alike.

    loss: of this rank's microbatch. failed: targets whose gradient is not finite on this rank, in the model's order.
    """

    def __init__(self, microbatch: Microbatch, loss: float, failed: Sequence[str]) -> None:
        super().__init__()
        self.microbatch = microbatch
        self.loss = loss
        self.failed = failed


class NoGradient(Exception):
    """Targets have none to start from; on all ranks alike. problem: why."""

    def __init__(self, names: Sequence[str], problem: str) -> None:
        super().__init__()
        self.names = names
        self.problem = problem

    def as_error(self, lora: LoraSection) -> UserError:
        """What to write instead."""
        parameters = {name: f"{name}.weight" for name in self.names}
        _, _, instead = to_leave_out([it if is_named(it, lora) else name for name, it in parameters.items()], lora)
        problem = f"{self.problem}, so there is no gradient to start from; {instead}"
        found = UserError("lora.target_modules", self.names, problem)
        found.on_all_ranks = True
        return found


class Observer:
    """Shows an engine the x and dy of its targets, without syncs, and accounts for each microbatch to all ranks."""

    def __init__(self, engine: EngineGroup, world: World, moment_share: float = 1.0, *, goes_on: bool = False) -> None:
        """moment_share: of the tokens, what moments of inputs are summed over. goes_on: an earlier run was shown what
        comes before."""
        self._engine = engine
        self._share = moment_share
        self._world = world
        self.names = list(engine.engine_of)
        self._routed = {name for name in self.names if engine.engine_of[name].is_routed(name)}
        self._row = {name: row for row, name in enumerate(self.names)}
        self._seen: set[str] = set()
        self._goes_on = goes_on
        self._failed = torch.zeros(len(self.names), dtype=torch.bool, device=world.device)

    def observe(self, name: str, x_TN: torch.Tensor, dy_TM: torch.Tensor) -> None:
        """A sink for taps."""
        self._seen.add(name)
        # a sum is finite exactly when its terms are, as float32 and bfloat16 hold any sum of a gradient's entries;
        # summing bfloat16 as it is is many times faster than as float32
        dtype = torch.float32 if dy_TM.dtype == torch.float16 else None
        # of Llama4's experts the tap shows dy as x
        for shown in (dy_TM, x_TN) if name in self._routed else (dy_TM,):
            self._failed[self._row[name]] |= ~shown.sum(dtype=dtype).isfinite()
        self._engine.observe(name, x_TN, dy_TM)

    def begin(self, microbatch: Microbatch) -> None:
        self._engine.begin_microbatch(microbatch.index)
        if self._engine.inputs.are_wanted:
            rows = counted_rows(microbatch, self._share)
            self._engine.inputs.begin_microbatch(rows, is_copy=microbatch.is_copy)

    def end(self, microbatch: Microbatch, loss: torch.Tensor) -> LossTotals:
        """After a backward; a collective. loss: of this rank's microbatch, a sum over its tokens.

        Raises NotFinite.
        """
        world = self._world
        counts = [microbatch.num_supervised_tokens, microbatch.num_terms]
        counts_here = torch.tensor(counts, dtype=torch.float64, device=world.device)
        sums = torch.cat([torch.stack([loss.detach().double(), self._failed.sum().double()]), counts_here])
        loss_value, failures, tokens, terms = world.sum_(sums).tolist()
        if failures or not math.isfinite(loss_value):
            failed = [name for name, row in self._row.items() if self._failed[row]]
            raise NotFinite(microbatch, loss.item(), failed)
        with failing_by_name("calibrate"):
            self._engine.end_microbatch(world)
        return LossTotals(loss_value, int(tokens), int(terms))

    def require_all_seen(self) -> None:
        """Raise NoGradient, on every rank, when a target took no part in the loss."""
        if not self._goes_on:  # else the earlier run may have seen them; without a gradient none is taken in the end
            in_every_microbatch = [name for name in self.names if name not in self._routed]
            require_all_seen(in_every_microbatch, self._seen, self._world)


@contextmanager
def failing_by_name(step: str) -> Iterator[None]:
    """Raise RunError, with its name, for a matrix that this rank cannot factorize."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if which := getattr(error, "__notes__", None):  # else a collective, which another rank has left
            raise RunError(f"{step}: the gradient {' '.join(which)}: {error}") from error
        raise


def require_all_seen(names: Sequence[str], seen: Container[str], world: World) -> None:
    """Raise NoGradient, on every rank, unless some rank saw each of these targets take part in the loss."""
    of_ranks = world.all_json([name for name in names if name not in seen])
    if missing := [name for name in of_ranks[0] if all(name in others for others in of_ranks[1:])]:
        raise NoGradient(missing, "took no part in the loss that autograd saw")


def name_the_culprit(model: nn.Module, found: NotFinite, sharding: Sharding) -> None:
    """Raise RunError on all ranks, naming batch and layer. Every rank runs its forward once more, since sharded weights
    come by collectives."""
    world, microbatch = sharding.world, found.microbatch
    with sharding.passing(pieces_of(model)):
        layer = first_nonfinite_module(model, microbatch, world.device)
    batch = f"microbatch {microbatch.index} (data rows {list(microbatch.sample_ids)}) on rank {world.rank}"
    with world.together():
        if not math.isfinite(found.loss):
            where = f"first in the output of {layer}" if layer else "although every module's output is finite"
            raise RunError(f"calibrate: the loss is {found.loss} in {batch}, {where}")
        if found.failed:  # the last is nearest the loss: the others inherited its gradient
            raise RunError(
                f"calibrate: the gradient of {found.failed[-1]} is not finite in {batch}; with float16, "
                "try model.dtype bfloat16"
            )
