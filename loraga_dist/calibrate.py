"""All sweeps of the plan: calibration data in, each owner's singular triplets out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from loraga_dist.calibration import Microbatch, without_supervision
from loraga_dist.config import GradientConfig
from loraga_dist.distributed import World
from loraga_dist.engines import GradientEngine, GradientSVD, SketchEngine
from loraga_dist.engines.group import EngineGroup
from loraga_dist.engines.home import StateHome
from loraga_dist.errors import RunError, UserError
from loraga_dist.losses import LossSum
from loraga_dist.plan import Plan
from loraga_dist.progress import phase
from loraga_dist.sharding.base import Sharding
from loraga_dist.sweep import full_float32_matmul, sweep


@dataclass
class Calibration:
    """What the sweeps found. `owned` holds this rank's targets only, on the host."""

    owned: dict[str, GradientSVD] = field(default_factory=dict)
    mean_loss: float = 0.0
    num_supervised_tokens: int = 0
    refine_passes: int = 0
    seconds_calibrate: float = 0.0
    seconds_factorize: float = 0.0


@full_float32_matmul()
def calibrate(
    model: nn.Module,
    plan: Plan,
    microbatches: Sequence[Microbatch],
    config: GradientConfig,
    *,
    sharding: Sharding,
    loss_sum: LossSum,
    seed: int,
) -> Calibration:
    """Accumulate, reduce and factorize the mean gradient of every target, one group of the plan after the other.

    Raises RunError for a loss or gradient that is not finite, or a target whose gradient is zero; UserError for a
    target outside the loss. On every rank alike.
    """
    world = sharding.world
    found = Calibration()
    with phase("calibrate", len(plan.sweeps) * len(microbatches), "batch", shown=world.is_main) as progress:

        def one_pass(names: list[str], engine: GradientEngine) -> tuple[float, int]:
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
            home = StateHome.choose(config.state_device, world.device, plan.state_bytes_per_rank)
            group = EngineGroup.of(matrices, home=home, seed=seed, dtype=next(model.parameters()).dtype)
            loss, num_tokens = one_pass([matrix.name for matrix in matrices], group)
            found.mean_loss, found.num_supervised_tokens = loss / num_tokens, num_tokens
            found.refine_passes = _refine_passes(config, plan, num_tokens / len(microbatches))
            for _ in range(found.refine_passes):
                for engine in (engine for engine in group.engines if isinstance(engine, SketchEngine)):
                    progress.extend(len(microbatches))
                    engine.begin_refinement(world)
                    one_pass(engine.names, engine)
            swept = time.monotonic()
            for name, result in group.factorize(world, num_tokens):
                found.owned[name] = _on_host(result)
            _refuse_zero_gradients(found.owned, world)
            found.seconds_calibrate += swept - started
            found.seconds_factorize += time.monotonic() - swept
    return found


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
