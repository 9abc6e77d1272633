"""Every group of the plan, one after the other: calibration data in, each owner's singular triplets out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace

import torch
from torch import nn

from loraga_dist.config import GradientConfig
from loraga_dist.data.losses import LOSSES
from loraga_dist.engines import ENGINES
from loraga_dist.engines.base import EngineState
from loraga_dist.engines.group import EngineGroup
from loraga_dist.engines.home import StateHome
from loraga_dist.errors import RunError
from loraga_dist.files.checkpoint import Checkpoint
from loraga_dist.gradients.checkpointer import Checkpointer
from loraga_dist.gradients.gradients import DataUsed, GradientFacts, Gradients
from loraga_dist.gradients.one_pass import full_float32_matmul, one_pass
from loraga_dist.gradients.passes import Position, is_time_to_look, median_cosine, steps_to_reach
from loraga_dist.linalg import TruncatedSVD
from loraga_dist.model.plan import Plan
from loraga_dist.ranks.memory import return_freed_memory
from loraga_dist.ranks.progress import Clock, Progress, phase
from loraga_dist.request.request import Request
from loraga_dist.sharding.base import Sharding


def calibrate(
    model: nn.Module,
    request: Request,
    *,
    sharding: Sharding,
    clock: Clock,
    checkpointer: Checkpointer | None = None,
) -> Gradients:
    """Take the mean gradient of every target, reduced to its owner and factorized there. Every rank calls this.

    clock: gets the phases `calibrate` and `factorize`.

    Raises RunError for a loss or gradient that is not finite, or a target whose gradient is zero; UserError for a
    target outside the loss. On every rank alike.
    """
    return _Calibrator(model, request, sharding, clock, checkpointer).run()


class _Calibrator:
    """One calibration on its way: where it stands, what it has found, and when that is saved."""

    def __init__(
        self,
        model: nn.Module,
        request: Request,
        sharding: Sharding,
        clock: Clock,
        checkpointer: Checkpointer | None,
    ) -> None:
        assert request.data is not None, "a scheme that takes gradients has data"
        self._model = model
        self._request = request
        self._sharding = sharding
        self._world = sharding.world
        self._checkpointer = checkpointer
        self._batches = request.data
        self._at = Position()
        self._used = DataUsed(num_samples=request.data.num_samples)
        self._owned: dict[str, TruncatedSVD] = {}
        self._facts: dict[str, GradientFacts] = {}
        self._clock = clock
        self._within_group: Checkpoint | None = None
        self._expected_steps = 0

    @full_float32_matmul()
    def run(self) -> Gradients:
        self._restore()
        self._expected_steps = self._num_steps
        groups = self._request.plan.groups
        first = self._steps_left if self._at.refinement == 0 and self._at.group < len(groups) else 0
        later = max(0, len(groups) - self._at.group - 1) * self._num_steps
        with phase("calibrate", first + later, "microbatches", shown=self._world.is_main) as progress:
            while self._at.group < len(groups):
                self._take_group(progress)
        return Gradients(owned=self._owned, facts=self._facts, data=self._used)

    @property
    def _num_steps(self) -> int:
        """Global microbatches in a pass over the data that is used."""
        return -(-self._used.num_samples // self._batches.samples_per_step)

    @property
    def _steps_left(self) -> int:
        """Of the pass that goes on; earlier runs' microbatches may have been larger or smaller."""
        return -(-(self._used.num_samples - self._at.num_samples) // self._batches.samples_per_step)

    def _expect(self, num_steps: int, progress: Progress) -> None:
        """Have the progress count on so many steps in this and every later group's first pass."""
        progress.extend((num_steps - self._expected_steps) * (len(self._request.plan.groups) - self._at.group))
        self._expected_steps = num_steps

    def _take_group(self, progress: Progress) -> None:
        """Accumulate the gradients of one group, refine them, factorize them, and keep the result."""
        with self._clock.phase("calibrate"):
            engines = self._accumulate(progress)
        with self._clock.phase("factorize"):
            facts, owned = self._factorize(engines)
        self._facts |= facts
        self._owned |= owned
        self._at = Position(group=self._at.group + 1)
        if self._checkpointer is not None:
            self._checkpointer.finish_group(_finished_state(facts, owned, self._used))

    def _accumulate(self, progress: Progress) -> EngineGroup:
        """All passes of one group."""
        config, plan = self._request.config, self._request.plan
        engines = EngineGroup.of(
            plan.groups[self._at.group],
            home=StateHome.choose(config.gradient.state_device, self._world.device, plan.state_bytes_per_rank),
            seed=config.init.seed,
            dtype=next(self._model.parameters()).dtype,
        )
        if self._within_group is not None:
            engines.load_state(self._within_group.content["engines"], self._within_group.tensors, self._world)
            self._within_group = None
        if self._at.refinement == 0:
            self._first_pass(engines, progress)
        refining = engines.refining
        while refining is not None and self._at.refinement <= self._used.refine_passes:
            progress.extend(self._steps_left)
            if self._at.num_microbatches == 0:
                refining.begin_refinement(self._world)
            self._pass(engines, refining, progress)
        return engines

    def _first_pass(self, engines: EngineGroup, progress: Progress) -> None:
        """The first group's decides how much data there is for all passes to come."""
        self._pass(engines, engines, progress, self._request.target_cosine if self._at.group == 0 else None)
        self._expect(self._num_steps, progress)
        totals, config = self._at.totals, self._request.config.gradient
        self._used = replace(
            self._used,
            num_supervised_tokens=totals.num_tokens,
            mean_loss=totals.loss_sum / totals.num_tokens,
            refine_passes=_refine_passes(config, self._request.plan, totals.num_tokens / self._num_steps),
        )

    def _pass(
        self,
        engines: EngineGroup,
        observing: EngineGroup,
        progress: Progress,
        target_cosine: float | None = None,
    ) -> None:
        """Show `observing`, one or more of the group's engines, the rest of the data of this pass.

        target_cosine: once the median split-half cosine reaches it, no new microbatch is looked at.
        """
        at, config = self._at, self._request.config
        left = []
        if at.num_samples < self._used.num_samples:
            left = self._batches.microbatches(at.num_samples, self._used.num_samples, at.num_microbatches)
        with one_pass(
            self._model,
            list(observing.engine_of) if left else [],
            observing,
            sharding=self._sharding,
            loss_sum=LOSSES[config.lora.task_type],
            checkpointing=config.gradient.checkpointing,
        ) as take:
            for microbatch in left:
                totals = take(microbatch)
                return_freed_memory()
                progress.advance()
                self._at = at = replace(
                    at,
                    num_microbatches=at.num_microbatches + 1,
                    num_samples=min(at.num_samples + self._batches.samples_per_step, self._used.num_samples),
                    totals=at.totals + totals if at.refinement == 0 else at.totals,
                )
                looks = is_time_to_look(at.num_microbatches) or microbatch is left[-1]
                if target_cosine is not None and looks:
                    self._look(observing, target_cosine, progress)
                if self._checkpointer is not None:
                    self._checkpointer.after_microbatch(lambda: self._state_within(engines))
                if at.num_samples == self._used.num_samples:
                    break
        self._at = replace(at, refinement=at.refinement + 1, num_samples=0, num_microbatches=0)

    def _look(self, engines: EngineGroup, target_cosine: float, progress: Progress) -> None:
        """See whether this was data enough, or else how much there may be to come."""
        at = self._at
        cosine = median_cosine(engines, self._world)
        if cosine >= target_cosine:
            self._used = replace(self._used, reached_target=True, num_samples=at.num_samples)
        else:
            self._expect(
                steps_to_reach(target_cosine, cosine, self._num_steps - self._steps_left, self._num_steps), progress
            )
        progress.note(f"split-half cosine {cosine:.2f} of {target_cosine:g}")

    def _factorize(self, engines: EngineGroup) -> tuple[dict[str, GradientFacts], dict[str, TruncatedSVD]]:
        """The facts of all the group's targets, and this rank's triplets, on the host: they must not crowd the device.

        Raises RunError, on every rank, where a gradient is zero or its owner cannot factorize it.
        """
        matrices, world = self._request.plan.matrices, self._world
        mine, owned = {}, {}
        num_owned = sum(matrices[name].owner == world.rank for name in engines.engine_of)
        # by the first failure of an owner all collectives are done
        with (
            world.together(),
            phase("factorize", num_owned, "targets", shown=world.is_main, nested=True) as progress,
        ):
            try:
                for name, found in engines.factorize(world, self._used.num_supervised_tokens):
                    svd = found.svd
                    owned[name] = TruncatedSVD(U_MK=svd.U_MK.cpu(), S_K=svd.S_K.cpu(), Vh_KN=svd.Vh_KN.cpu())
                    mine[name] = asdict(GradientFacts.of(matrices[name], found))
                    progress.advance()
            except (RuntimeError, ValueError) as error:
                if which := getattr(error, "__notes__", None):  # else a collective, which another rank has left
                    raise RunError(f"factorize: the gradient {' '.join(which)}: {error}") from error
                raise
        facts = {name: GradientFacts(**it) for part in world.all_json(mine) for name, it in part.items()}
        tiny = torch.finfo(torch.float32).tiny
        zero = [name for name, of_target in facts.items() if not of_target.singular_values[0] > tiny]
        with world.together():
            if zero:
                raise RunError(
                    f"factorize: the gradient of {', '.join(zero)} is zero; leave these out with lora.exclude_modules"
                )
        return facts, owned

    def _state_within(self, engines: EngineGroup) -> EngineState:
        """All that a later run needs to go on from between two microbatches; a collective."""
        state = engines.save_state(self._world)
        content = {"position": asdict(self._at), "data": asdict(self._used), "engines": state.content}
        return EngineState(content, state.tensors)

    def _restore(self) -> None:
        """Go on from what an earlier run of the same work left."""
        if self._checkpointer is None:
            return
        found = self._checkpointer.found
        for saved in found.finished:
            facts = {name: GradientFacts(**it) for name, it in saved.content["facts"].items()}
            self._facts |= facts
            for name in facts:
                if self._request.plan.owners[name] == self._world.rank:
                    parts = {part.name: saved.tensors[f"{name}.{part.name}"] for part in fields(TruncatedSVD)}
                    self._owned[name] = TruncatedSVD(**parts)
            self._used = DataUsed(**saved.content["data"])
        self._at, self._within_group = Position(group=len(found.finished)), found.newest
        if self._within_group is not None:
            self._at = Position.of_json(self._within_group.content["position"])
            self._used = DataUsed(**self._within_group.content["data"])


def _finished_state(
    facts: Mapping[str, GradientFacts],
    owned: Mapping[str, TruncatedSVD],
    used: DataUsed,
) -> EngineState:
    """A group's results, as a later run takes them."""
    content = {
        "facts": {name: asdict(of_target) for name, of_target in facts.items()},
        "data": asdict(used),
    }
    tensors = {f"{name}.{part}": tensor for name, svd in owned.items() for part, tensor in vars(svd).items()}
    return EngineState(content, tensors)


def _refine_passes(config: GradientConfig, plan: Plan, tokens_per_microbatch: float) -> int:
    """How often the engines that refine see the data again.

    `auto`: once where a global microbatch has fewer supervised tokens than a sketch has columns. The gradients of such
    microbatches share few directions, and bases from the ones seen so far miss too much of the next.
    """
    if config.refine_passes != "auto":
        return config.refine_passes
    widths = [matrix.width for matrix in plan.matrices.values() if ENGINES[matrix.engine].refines]
    return int(tokens_per_microbatch < max(widths, default=0))
