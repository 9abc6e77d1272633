"""Where a calibration stands in its passes over the data, and when it has seen enough."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loraga_dist.config import GradientConfig
from loraga_dist.engines import ENGINES
from loraga_dist.engines.group import EngineGroup
from loraga_dist.gradients.observer import LossTotals
from loraga_dist.model.plan import Plan
from loraga_dist.ranks.world import World


@dataclass(frozen=True, kw_only=True)
class Position:
    """A sweep over groups of the plan, a pass over the data for it (0, then refinements), and how far that pass is."""

    group: int = 0
    """The first of the sweep: all before it are finished."""
    num_groups: int = 0
    """In the sweep; 0 before it has begun."""
    refinement: int = 0
    num_samples: int = 0
    """Of the chunks that all groups of the sweep have seen."""
    num_microbatches: int = 0
    """Of these chunks."""
    chunk_end: int = 0
    """Where the next chunk ends, in samples, if some groups of the sweep have seen it; else 0."""
    num_groups_ahead: int = 0
    """So many of the first have."""
    totals: LossTotals = field(default_factory=LossTotals)
    """Of the sweep's first pass."""

    @classmethod
    def of_json(cls, content: dict[str, Any]) -> Position:
        numbers: dict[str, Any] = content | {"totals": LossTotals(**content["totals"])}
        return cls(**numbers)


def is_time_to_look(num_microbatches: int) -> bool:
    """After 4, 6, 8, 12, 16, 24, ... microbatches: few collectives, and at most half too many microbatches."""
    step = 2
    while 4 * step <= num_microbatches:
        step *= 2
    return num_microbatches >= 4 and not num_microbatches % step


def chunk_end(start: int, stop: int, most: int | None, *, at_looks: bool) -> int:
    """Where a chunk ends that begins after `start` of `stop` microbatches, with so many at most, None for all.

    at_looks: none goes on past a look.
    """
    end = stop if most is None else min(stop, start + most)
    return next(filter(is_time_to_look, range(start + 1, end)), end) if at_looks else end


def median_cosine(engines: Sequence[EngineGroup], world: World) -> float:
    """The median split-half cosine over all ranks' matrices with two halves; 0 where there is none. A collective."""
    everyone = world.all_json([cosine for engine in engines for cosine in engine.split_half_cosines(world)])
    known = [cosine for cosines in everyone for cosine in cosines if cosine is not None]
    return statistics.median(known) if known else 0.0


def steps_to_reach(target_cosine: float, cosine: float, num_steps: int, most: int) -> int:
    """At which look halves will agree by `target_cosine`, if after `num_steps` microbatches they do by `cosine`.

    A half's gradient is the mean one and noise, whose energy falls as one over the data n: cosine = 1 / (1 + c / n).
    """
    wanted = num_steps * (1 / cosine - 1) / (1 / target_cosine - 1) if cosine > 0 else most
    steps = max(num_steps + 1, math.ceil(min(wanted, most)))
    while not is_time_to_look(steps):
        steps += 1
    return min(steps, most)


def num_refine_passes(config: GradientConfig, plan: Plan, tokens_per_microbatch: float) -> int:
    """How often the engines that refine see the data again.

    `auto`: once where a global microbatch has fewer supervised tokens than a sketch has columns, of experts by their
    share. The gradients of such microbatches share few directions, and bases from the ones seen so far miss too much of
    the next.
    """
    if config.refine_passes != "auto":
        return config.refine_passes
    refining = (matrix for matrix in plan.matrices.values() if ENGINES[matrix.engine].refines)
    return int(any(tokens_per_microbatch * matrix.row_share < matrix.width for matrix in refining))
