"""All sweeps of the plan: calibration data in, each owner's singular triplets out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from loraga_dist.calibration import Microbatch, without_supervision
from loraga_dist.config import GradientConfig
from loraga_dist.distributed import World
from loraga_dist.engines import GradientEngine, GradientSVD, SketchEngine
from loraga_dist.engines.group import EngineGroup
from loraga_dist.errors import RunError, UserError
from loraga_dist.losses import LossSum
from loraga_dist.plan import Plan
from loraga_dist.progress import phase
from loraga_dist.sharding.base import Sharding
from loraga_dist.sweep import sweep


@dataclass
class Calibration:
    """What the sweeps found. `owned` holds this rank's targets only, on the host."""

    owned: dict[str, GradientSVD] = field(default_factory=dict)
    mean_loss: float = 0.0
    num_supervised_tokens: int = 0
    num_microbatches: int = 0
    """Global microbatches that were used; fewer than there are only where `reached_target`."""
    reached_target: bool = False
    refine_passes: int = 0
    seconds_calibrate: float = 0.0
    seconds_factorize: float = 0.0


def calibrate(
    model: nn.Module,
    plan: Plan,
    microbatches: Sequence[Microbatch],
    config: GradientConfig,
    *,
    sharding: Sharding,
    loss_sum: LossSum,
    seed: int,
    target_cosine: float | None,
) -> Calibration:
    """Accumulate, reduce and factorize the mean gradient of every target, one group of the plan after the other.

    target_cosine: once the median split-half cosine of the first group reaches it, no new microbatch is looked at.

    Raises RunError for a loss or gradient that is not finite, or a target whose gradient is zero; UserError for a
    target outside the loss. On every rank alike.
    """
    world = sharding.world
    found = Calibration()
    with phase("calibrate", len(plan.sweeps) * len(microbatches), "batch", shown=world.is_main) as progress:

        def one_pass(names: list[str], engine: GradientEngine, microbatches: Iterable[Microbatch]) -> tuple[float, int]:
            return sweep(
                model,
                names,
                microbatches,
                engine,
                sharding=sharding,
                loss_sum=loss_sum,
                checkpointing=config.checkpointing,
                progress=progress,
            )

        for matrices in plan.sweeps:
            started = time.monotonic()
            group = EngineGroup.of(matrices, device=world.device, seed=seed)
            stream = _UntilEnough(microbatches, group, target_cosine, world)
            loss, num_tokens = one_pass([matrix.name for matrix in matrices], group, stream)
            progress.extend((stream.num_taken - len(microbatches)) * len(plan.sweeps))
            microbatches, target_cosine = microbatches[: stream.num_taken], None
            found.num_microbatches = stream.num_taken
            found.reached_target |= stream.reached_target
            found.mean_loss, found.num_supervised_tokens = loss / num_tokens, num_tokens
            found.refine_passes = _refine_passes(config, plan, num_tokens / len(microbatches))
            for _ in range(found.refine_passes):
                for engine in (engine for engine in group.engines if isinstance(engine, SketchEngine)):
                    progress.extend(len(microbatches))
                    engine.begin_refinement(world)
                    one_pass(engine.names, engine, microbatches)
            swept = time.monotonic()
            for name, result in group.factorize(world, num_tokens):
                found.owned[name] = _on_host(result)
            _refuse_zero_gradients(found.owned, world)
            found.seconds_calibrate += swept - started
            found.seconds_factorize += time.monotonic() - swept
    return found


class _UntilEnough:
    """This rank's microbatches, until two halves of those taken agree on the gradient; the same number on every rank.

    Ends early where the median split-half cosine over all ranks' matrices reaches `target_cosine`, if there is one.
    """

    def __init__(
        self, microbatches: Sequence[Microbatch], engine: GradientEngine, target_cosine: float | None, world: World
    ) -> None:
        self._microbatches = microbatches
        self._engine = engine
        self._target_cosine = target_cosine
        self._world = world
        self.num_taken = 0
        self.reached_target = False

    def __iter__(self) -> Iterator[Microbatch]:
        for microbatch in self._microbatches:
            yield microbatch
            # from here on the engine has seen it
            self.num_taken += 1
            if self._target_cosine is not None and self._is_checked():
                self.reached_target = self._median_cosine() >= self._target_cosine
            if self.reached_target:
                break

    def _is_checked(self) -> bool:
        """After 4, 6, 8, 12, 16, 24, ... microbatches and the last: few collectives, and at most half too many."""
        zeros = self.num_taken.bit_length() - 2
        return self.num_taken == len(self._microbatches) or (zeros > 0 and self.num_taken % (1 << zeros) == 0)

    def _median_cosine(self) -> float:
        everyone = self._world.all_json(self._engine.split_half_cosines(self._world))
        return statistics.median(cosine or 0.0 for cosines in everyone for cosine in cosines)


def _refine_passes(config: GradientConfig, plan: Plan, tokens_per_microbatch: float) -> int:
    """How often `sketch` sees the data again.

    `auto`: once where a global microbatch has fewer supervised tokens than a sketch has columns. The gradients of such
    microbatches share few directions, and bases from the ones seen so far miss too much of the next.
    """
    if config.refine_passes != "auto":
        return config.refine_passes
    widths = [matrix.width for matrices in plan.sweeps for matrix in matrices if matrix.engine == "sketch"]
    return int(tokens_per_microbatch < max(widths, default=0))


def in_step(microbatches: Sequence[Microbatch], world: World) -> list[Microbatch]:
    """The same number of microbatches on every rank, because each forward under ZeRO-3 is a collective.

    Ranks with fewer get copies without supervised tokens. Raises UserError when a rank has none, or all have no token.
    """
    tokens = torch.tensor(sum(microbatch.num_supervised_tokens for microbatch in microbatches), device=world.device)
    with world.together():
        if not microbatches:
            raise UserError("dataloader", world.rank, "yields no batch on this rank; give every rank at least one")
    world.sum_(tokens)
    with world.together():
        if not tokens:
            raise UserError("dataloader", 0, "has no supervised token on any rank: every label is -100")
    most = int(world.max_(torch.tensor(len(microbatches), device=world.device)))
    fillers = [without_supervision(microbatches[0], index) for index in range(len(microbatches), most)]
    return [*microbatches, *fillers]


def _on_host(result: GradientSVD) -> GradientSVD:
    # factors of targets long done must not crowd the device
    svd = result.svd
    host = replace(svd, U_MK=svd.U_MK.cpu(), S_K=svd.S_K.cpu(), Vh_KN=svd.Vh_KN.cpu())
    return replace(result, svd=host)


def _refuse_zero_gradients(owned: dict[str, GradientSVD], world: World) -> None:
    tiny = torch.finfo(torch.float32).tiny
    mine = [name for name, result in owned.items() if not result.svd.S_K[0] > tiny]
    zero = [name for names in world.all_json(mine) for name in names]
    with world.together():
        if zero:
            raise RunError(
                f"factorize: the gradient of {', '.join(zero)} is zero; leave these out with lora.exclude_modules"
            )
