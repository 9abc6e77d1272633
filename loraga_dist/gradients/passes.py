"""The calibration data as a sweep takes it: where a run stands in it, and when it has seen enough."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from loraga_dist.data.samples import Deal, Microbatch
from loraga_dist.engines import GradientEngine, GradientSVD
from loraga_dist.gradients.one_pass import LossTotals
from loraga_dist.ranks.world import World

IsEnough = Callable[[int, bool], bool]
"""is_enough(microbatches so far, whether that was the last): end the pass here?"""


@dataclass
class Calibration:
    """What the sweeps found. `owned` holds this rank's targets only, on the host."""

    owned: dict[str, GradientSVD] = field(default_factory=dict)
    mean_loss: float = 0.0
    num_supervised_tokens: int = 0
    num_samples: int = 0
    """That were used; fewer than there are only where `reached_target`."""
    reached_target: bool = False
    refine_passes: int = 0
    seconds_calibrate: float = 0.0
    seconds_factorize: float = 0.0


@dataclass
class Position:
    """How far a calibration is: a sweep of the plan, a pass of it (0, then refinements), and the data of that pass."""

    sweep: int = 0
    refinement: int = 0
    num_samples: int = 0
    num_microbatches: int = 0
    totals: LossTotals = field(default_factory=LossTotals)


class Stream:
    """This rank's microbatches of one pass, from where it stands; as many on every rank. Keeps count as they are used.

    after_microbatch: called when the engine has seen one more and the counts are right.
    """

    def __init__(
        self,
        deal: Deal,
        found: Calibration,
        at: Position,
        is_enough: IsEnough,
        after_microbatch: Callable[[], None],
    ) -> None:
        self._step = deal.samples_per_step
        self._found = found
        self._at = at
        self._is_enough = is_enough
        self._after_microbatch = after_microbatch
        left = at.num_samples < found.num_samples
        self.rest = deal.microbatches(at.num_samples, found.num_samples, at.num_microbatches) if left else []

    def __iter__(self) -> Iterator[Microbatch]:
        at, found = self._at, self._found
        for microbatch in self.rest:
            yield microbatch
            # from here on the engine has seen it
            at.num_microbatches += 1
            at.num_samples = min(at.num_samples + self._step, found.num_samples)
            if self._is_enough(at.num_microbatches, microbatch is self.rest[-1]):
                found.reached_target, found.num_samples = True, at.num_samples
            self._after_microbatch()
            if at.num_samples == found.num_samples:
                return


def halves_agree(engine: GradientEngine, target_cosine: float | None, world: World) -> IsEnough:
    """Whether the median split-half cosine over all ranks' matrices reaches `target_cosine`; never with None."""

    def is_enough(num_microbatches: int, is_last: bool) -> bool:
        if target_cosine is None or not (is_last or _is_checked(num_microbatches)):
            return False
        everyone = world.all_json(engine.split_half_cosines(world))
        return statistics.median(cosine or 0.0 for cosines in everyone for cosine in cosines) >= target_cosine

    return is_enough


def _is_checked(num_microbatches: int) -> bool:
    """After 4, 6, 8, 12, 16, 24, ...: few collectives, and at most half too many microbatches."""
    zeros = num_microbatches.bit_length() - 2
    return zeros > 0 and num_microbatches % (1 << zeros) == 0
