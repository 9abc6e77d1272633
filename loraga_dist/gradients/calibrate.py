"""All sweeps of the plan: calibration data in, each owner's singular triplets out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

import torch
from torch import nn

from loraga_dist.config import GradientConfig
from loraga_dist.data.losses import LossSum
from loraga_dist.data.samples import Deal, Microbatch, without_supervision
from loraga_dist.engines import ENGINES, GradientEngine, GradientSVD
from loraga_dist.engines.base import EngineState, Tensors
from loraga_dist.engines.group import EngineGroup
from loraga_dist.engines.home import StateHome
from loraga_dist.errors import RunError, UserError
from loraga_dist.gradients.one_pass import LossTotals, full_float32_matmul, run_pass
from loraga_dist.gradients.passes import Calibration, IsEnough, Position, Stream, halves_agree
from loraga_dist.linalg import TruncatedSVD
from loraga_dist.model.plan import Plan
from loraga_dist.ranks.progress import phase
from loraga_dist.ranks.world import World
from loraga_dist.sharding.base import Sharding

_ENGINES = "engines"
"""In saved content: the engines' part. Absent between two sweeps."""


class Saved(Protocol):
    """A calibration's state as it was saved: JSON and tensors."""

    @property
    def content(self) -> dict[str, Any]: ...

    @property
    def tensors(self) -> Tensors: ...


class Keeper(Protocol):
    """Saves what a later run goes on from."""

    def restored(self) -> Saved | None:
        """What an earlier run of the same work left; a collective."""
        ...

    def after_microbatch(self, state: Callable[[], EngineState]) -> None:
        """Save if it is time, on all ranks alike; raises Preempted where the run was asked to stop. A collective."""
        ...

    def save(self, state: EngineState) -> None: ...

    def leave_if_asked(self) -> None:
        """Where nothing is to be saved; raises Preempted like `after_microbatch`. A collective."""
        ...


@full_float32_matmul()
def calibrate(
    model: nn.Module,
    plan: Plan,
    deal: Deal,
    config: GradientConfig,
    *,
    sharding: Sharding,
    loss_sum: LossSum,
    seed: int,
    target_cosine: float | None = None,
    keeper: Keeper | None = None,
) -> Calibration:
    """Accumulate, reduce and factorize the mean gradient of every target, one group of the plan after the other.

    target_cosine: once the median split-half cosine of the first group reaches it, no new microbatch is looked at.

    Raises RunError for a loss or gradient that is not finite, or a target whose gradient is zero; UserError for a
    target outside the loss. On every rank alike.
    """
    world = sharding.world
    found, at = Calibration(num_samples=deal.num_samples), Position()
    saved = keeper.restored() if keeper is not None else None
    if saved is not None:
        found, at = _restored(saved, plan, world)
    num_steps = _steps(found, deal)
    with phase("calibrate", (len(plan.groups) - at.sweep) * num_steps, "batch", shown=world.is_main) as progress:

        def one_pass(
            at: Position, group: EngineGroup, engine: GradientEngine, names: list[str], is_enough: IsEnough
        ) -> None:
            def keep() -> None:
                if keeper is not None:
                    keeper.after_microbatch(lambda: _state(found, at, group, world))

            stream = Stream(deal, found, at, is_enough, keep)
            if stream.rest:
                run_pass(
                    model,
                    names,
                    stream,
                    engine,
                    sharding=sharding,
                    loss_sum=loss_sum,
                    checkpointing=config.checkpointing,
                    progress=progress,
                    totals=at.totals,
                )
            at.refinement, at.num_samples, at.num_microbatches = at.refinement + 1, 0, 0

        for matrices in plan.groups[at.sweep :]:
            started = time.monotonic()
            home = StateHome.choose(config.state_device, world.device, plan.state_bytes_per_rank)
            group = EngineGroup.of(matrices, home=home, seed=seed, dtype=next(model.parameters()).dtype)
            if saved is not None and _ENGINES in saved.content:
                group.load_state(saved.content[_ENGINES], saved.tensors, world)
                progress.extend(-at.num_microbatches)
            saved = None
            if at.refinement == 0:
                # the first sweep decides how much data there is for all passes
                is_enough = halves_agree(group, target_cosine if at.sweep == 0 else None, world)
                one_pass(at, group, group, [matrix.name for matrix in matrices], is_enough)
                progress.extend((_steps(found, deal) - num_steps) * (len(plan.groups) - at.sweep))
                num_steps = _steps(found, deal)
                found.num_supervised_tokens = at.totals.num_tokens
                found.mean_loss = at.totals.loss_sum / at.totals.num_tokens
                found.refine_passes = _refine_passes(config, plan, at.totals.num_tokens / num_steps)
            for engine in group.refining:
                while at.refinement <= found.refine_passes:
                    progress.extend(num_steps)
                    if at.num_microbatches == 0:
                        engine.begin_refinement(world)
                    one_pass(at, group, engine, engine.names, halves_agree(engine, None, world))
            swept = time.monotonic()
            for name, result in group.factorize(world, found.num_supervised_tokens):
                found.owned[name] = _on_host(result)
            _refuse_zero_gradients(found.owned, world)
            found.seconds_calibrate += swept - started
            found.seconds_factorize += time.monotonic() - swept
            at = Position(sweep=at.sweep + 1)
            if keeper is not None:
                keeper.save(_state(found, at, None, world))
    return found


def _steps(found: Calibration, deal: Deal) -> int:
    """Global microbatches in a pass over the data that is used."""
    return -(-found.num_samples // deal.samples_per_step)


def _state(found: Calibration, at: Position, group: EngineGroup | None, world: World) -> EngineState:
    """Everything a later run needs, from between two microbatches or, without a group, after a sweep."""
    numbers = {
        name: [result.captured_energy, result.split_half_cosine, result.window_capture]
        for name, result in found.owned.items()
    }
    tensors = {
        f"{name}/svd.{part}": tensor
        for name, result in found.owned.items()
        for part, tensor in (("U", result.svd.U_MK), ("S", result.svd.S_K), ("Vh", result.svd.Vh_KN))
    }
    content: dict[str, Any] = {
        "found": asdict(replace(found, owned={})),
        "numbers": {name: of_target for part in world.all_json(numbers) for name, of_target in part.items()},
        "at": asdict(at),
    }
    if group is not None:
        engines = group.save_state(world)
        content[_ENGINES] = engines.content
        tensors |= engines.tensors
    return EngineState(content, tensors)


def _restored(saved: Saved, plan: Plan, world: World) -> tuple[Calibration, Position]:
    content, tensors = saved.content, saved.tensors
    found = Calibration(**content["found"])
    owners = plan.owners
    for name, (captured, cosine, capture) in content["numbers"].items():
        if owners[name] == world.rank:
            U_MK, S_K, Vh_KN = (tensors[f"{name}/svd.{part}"] for part in ("U", "S", "Vh"))
            found.owned[name] = GradientSVD(
                svd=TruncatedSVD(U_MK=U_MK, S_K=S_K, Vh_KN=Vh_KN),
                captured_energy=captured,
                split_half_cosine=cosine,
                window_capture=capture,
            )
    at = content["at"]
    return found, Position(**(at | {"totals": LossTotals(**at["totals"])}))


def _refine_passes(config: GradientConfig, plan: Plan, tokens_per_microbatch: float) -> int:
    """How often `sketch` sees the data again.

    `auto`: once where a global microbatch has fewer supervised tokens than a sketch has columns. The gradients of such
    microbatches share few directions, and bases from the ones seen so far miss too much of the next.
    """
    if config.refine_passes != "auto":
        return config.refine_passes
    widths = [matrix.width for matrices in plan.groups for matrix in matrices if ENGINES[matrix.engine].refines]
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
