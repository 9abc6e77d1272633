"""Every group of the plan, one after the other: calibration data in, each owner's singular triplets out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace

import torch
from torch import nn

from loraga_dist.data.losses import LOSSES
from loraga_dist.data.microbatches import Microbatch
from loraga_dist.engines.base import EngineState
from loraga_dist.engines.group import EngineGroup
from loraga_dist.engines.home import StateHome
from loraga_dist.files.checkpoint import Checkpoint
from loraga_dist.gradients.block_order import BlockOrder, OnWay
from loraga_dist.gradients.checkpointer import ORDER, Checkpointer
from loraga_dist.gradients.gradients import DataUsed, GradientFacts, Gradients
from loraga_dist.gradients.kept import Keeping
from loraga_dist.gradients.observer import NoGradient, NotFinite, Observer, failing_by_name, name_the_culprit
from loraga_dist.gradients.passes import (
    Position,
    chunk_end,
    is_time_to_look,
    median_cosine,
    num_refine_passes,
    steps_to_reach,
)
from loraga_dist.gradients.route import ModelOrder, Route
from loraga_dist.linalg import TruncatedSVD
from loraga_dist.model.blocks import Order
from loraga_dist.model.plan import sweep_end
from loraga_dist.ranks.memory import free_bytes, return_freed_memory
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
    keeping: Keeping = Keeping(),  # noqa: B008
) -> Gradients:
    """Take the mean gradient of every target, reduced to its owner and factorized there. Every rank calls this.

    clock: gets the phases `calibrate` and `factorize`. keeping: of block order, the same chunks on all ranks.

    Raises RunError for a loss or gradient that is not finite; UserError for a target outside the loss, or whose
    gradient is zero. On every rank alike. NotInBlocks before anything is found, where the model is not what
    block order takes it for.
    """
    return _Calibrator(model, request, sharding, clock, checkpointer, keeping).run()


class _Calibrator:
    """One calibration on its way: where it stands, what it has found, and when that is saved."""

    def __init__(
        self,
        model: nn.Module,
        request: Request,
        sharding: Sharding,
        clock: Clock,
        checkpointer: Checkpointer | None,
        keeping: Keeping,
    ) -> None:
        assert request.data is not None, "a scheme that takes gradients has data"
        self._model = model
        self._request = request
        self._plan = request.plan
        self._sharding = sharding
        self._world = sharding.world
        self._checkpointer = checkpointer
        self._keeping = keeping
        self._batches = request.data
        self._at = Position()
        self._used = DataUsed(num_samples=request.data.num_samples)
        self._owned: dict[str, TruncatedSVD] = {}
        self._facts: dict[str, GradientFacts] = {}
        self._clock = clock
        self._within_sweep: Checkpoint | None = None
        self._engines: list[EngineGroup] = []
        """Of the groups of the sweep."""
        self._state_bytes = 0
        """Of the largest sweep so far."""
        self._announced = self._expected_steps = 0

    def run(self) -> Gradients:
        self._restore()
        read_before = self._sharding.num_bytes_read
        unit = "microbatches" if self._plan.order.blocks is None else "block passes"
        self._announced = self._expected_steps = self._steps_to_come()
        with phase("calibrate", self._expected_steps, unit, shown=self._world.is_main) as progress:
            route = self._route(progress)
            try:
                with route.opened():
                    while self._at.group < len(self._plan.groups):
                        self._take_sweep(route, progress)
            except NotFinite as found:
                name_the_culprit(self._model, found, self._sharding)
                raise
            except NoGradient as found:
                raise found.as_error(self._request.config.lora) from None
        num_bytes_read = self._sharding.num_bytes_read - read_before
        return Gradients(
            owned=self._owned,
            facts=self._facts,
            data=self._used,
            order=self._plan.order,
            num_bytes_read=num_bytes_read,
            state_bytes_per_rank=self._state_bytes,
        )

    def _route(self, progress: Progress) -> Route:
        config, order = self._request.config, self._plan.order
        loss = LOSSES[config.lora.task_type]
        if order.blocks is None:
            checkpointing = config.gradient.checkpointing
            if checkpointing == "auto":
                checkpointing = "non_reentrant" if self._keeping.recomputes else "none"
            return ModelOrder(self._model, loss, sharding=self._sharding, checkpointing=checkpointing)
        return BlockOrder(
            self._model,
            order.blocks,
            loss,
            targets=[target.name for target in self._plan.targets],
            sharding=self._sharding,
            keeping=self._keeping,
            on_way=OnWay(pause=self._save_if_due, advance=progress.advance),
        )

    @property
    def _num_steps(self) -> int:
        """Global microbatches in a pass over the data that is used."""
        return -(-self._used.num_samples // self._batches.samples_per_step)

    @property
    def _steps_left(self) -> int:
        """Of the pass that goes on; earlier runs' microbatches may have been larger or smaller."""
        return -(-(self._used.num_samples - self._at.num_samples) // self._batches.samples_per_step)

    @property
    def _chunk(self) -> int | None:
        """Microbatches at a time; None for all."""
        return 1 if self._plan.order.blocks is None else self._keeping.chunk_microbatches

    def _sweep_end(self, first: int) -> int:
        return sweep_end(
            self._plan,
            self._request.config.gradient,
            first,
            in_one_chunk=self._chunk is None or self._chunk >= self._num_steps,
            looks=self._request.target_cosine is not None,
        )

    def _steps_to_come(self) -> int:
        """Steps of progress of all first passes that are not over."""
        blocks, steps, group = self._plan.order.blocks, 0, self._at.group
        while group < len(self._plan.groups):
            end = self._sweep_end(group)
            forward = 0 if blocks is None or (group > self._at.group and end == group + 1) else blocks.count
            is_now = group == self._at.group
            left = (self._steps_left if self._at.refinement == 0 else 0) if is_now else self._num_steps
            steps += left * (forward + end - group)
            group = end
        return steps

    def _take_sweep(self, route: Route, progress: Progress) -> None:
        """Accumulate the gradients of some groups, refine them, factorize them, and keep the result."""
        first = self._at.group
        with self._clock.phase("calibrate"):
            self._accumulate(route, progress)
        for index, engines in enumerate(self._engines, first):
            with self._clock.phase("factorize"):
                facts, owned = self._factorize(engines)
            self._facts |= facts
            self._owned |= owned
            self._at = Position(group=index + 1)
            if self._checkpointer is not None:
                self._checkpointer.finish_group(_finished_state(facts, owned, self._used, self._plan.order))
        self._engines = []

    def _accumulate(self, route: Route, progress: Progress) -> None:
        """All passes of one sweep."""
        config, plan, at = self._request.config, self._plan, self._at
        if not at.num_groups:
            self._at = at = replace(at, num_groups=self._sweep_end(at.group) - at.group)
        groups = plan.groups[at.group : at.group + at.num_groups]
        state_bytes = sum(map(plan.state_bytes, groups))
        self._state_bytes = max(self._state_bytes, state_bytes)
        device = self._world.device
        free = free_bytes(device, self._world.ranks_on_node)
        home = StateHome.choose(config.gradient.state_device, device, state_bytes=state_bytes, free_bytes=free)
        dtype = next(self._model.parameters()).dtype
        self._engines = [EngineGroup.of(group, home=home, seed=config.init.seed, dtype=dtype) for group in groups]
        if self._within_sweep is not None:
            saved, self._within_sweep = self._within_sweep, None
            for engines, content in zip(self._engines, saved.content["engines"], strict=True):
                engines.load_state(content, saved.tensors, self._world)
        if self._at.refinement == 0:
            self._first_pass(route, progress)
        refining = [engines.refining for engines in self._engines]
        while any(refining) and self._at.refinement <= self._used.refine_passes:
            progress.extend(self._steps_left * sum(each is not None for each in refining))
            if self._at.num_microbatches == 0 and not self._at.num_groups_ahead:
                for each in refining:
                    if each is not None:
                        with failing_by_name("calibrate"):
                            each.begin_refinement(self._world)
            self._pass(route, refining, progress)
            self._save_if_due()

    def _first_pass(self, route: Route, progress: Progress) -> None:
        """The first sweep's decides how much data there is for all passes to come."""
        self._pass(route, self._engines, progress, self._request.target_cosine if self._at.group == 0 else None)
        totals, config = self._at.totals, self._request.config.gradient
        self._used = replace(
            self._used,
            num_supervised_tokens=totals.num_tokens,
            num_terms=totals.num_terms,
            mean_loss=totals.loss_sum / totals.num_terms,
            refine_passes=num_refine_passes(config, self._plan, totals.num_tokens / self._num_steps),
        )
        self._save_if_due()

    def _pass(
        self,
        route: Route,
        observing: Sequence[EngineGroup | None],
        progress: Progress,
        target_cosine: float | None = None,
    ) -> None:
        """Show the sweep's engines, or those of each that refine, the rest of the data of this pass.

        target_cosine: once the median split-half cosine reaches it, no new microbatch is looked at.
        """
        goes_on, share = bool(self._at.num_samples or self._at.num_groups_ahead), self._request.moment_share
        observers = [each and Observer(each, self._world, share, goes_on=goes_on) for each in observing]
        while self._at.num_samples < self._used.num_samples:
            at, stop = self._at, self._at.chunk_end or self._used.num_samples
            most = None if at.chunk_end else self._chunk
            if most is not None:
                stop = min(stop, at.num_samples + most * self._batches.samples_per_step)
            left = self._batches.microbatches(at.num_samples, stop, at.num_microbatches)
            # one that some groups have seen is the same for the others
            at_looks, done = target_cosine is not None and not at.chunk_end, at.num_microbatches
            chunk = left[: chunk_end(done, done + len(left), most, at_looks=at_looks) - done]
            end = min(at.num_samples + len(chunk) * self._batches.samples_per_step, stop)
            for index, observer in list(enumerate(observers))[at.num_groups_ahead :]:
                if observer is not None:
                    self._show(route, chunk, observer, progress, counts=index == 0 and at.refinement == 0)
                if index + 1 < len(observers):
                    self._at = replace(self._at, num_groups_ahead=index + 1, chunk_end=end)
                    self._save_if_due()
            num_microbatches = at.num_microbatches + len(chunk)
            self._at = replace(
                self._at, num_samples=end, num_microbatches=num_microbatches, chunk_end=0, num_groups_ahead=0
            )
            looks = is_time_to_look(num_microbatches) or end == self._used.num_samples
            if target_cosine is not None and looks:
                self._look(target_cosine, progress)
            if end < self._used.num_samples:
                self._save_if_due()
        for observer in observers:
            if observer is not None:
                observer.require_all_seen()
        self._at = replace(self._at, refinement=self._at.refinement + 1, num_samples=0, num_microbatches=0)

    def _show(
        self, route: Route, chunk: Sequence[Microbatch], observer: Observer, progress: Progress, *, counts: bool
    ) -> None:
        """Show one group's engines a chunk. counts: its loss and tokens do."""
        with route.showing(chunk, observer.names, observer.observe) as take:
            for microbatch in chunk:
                observer.begin(microbatch)
                totals = observer.end(microbatch, take(microbatch))
                return_freed_memory()
                progress.advance()
                if counts:
                    self._at = replace(self._at, totals=self._at.totals + totals)

    def _look(self, target_cosine: float, progress: Progress) -> None:
        """See whether this was data enough, or else how much there may be to come."""
        cosine = median_cosine(self._engines, self._world)
        whole, left = self._num_steps, self._steps_left
        if cosine >= target_cosine:
            self._used = replace(self._used, reached_target=True, num_samples=self._at.num_samples)
            expected = whole - left
        else:
            expected = steps_to_reach(target_cosine, cosine, whole - left, whole)
        # in proportion: the whole was announced
        progress.extend(math.ceil(self._announced * expected / whole) - self._expected_steps)
        self._expected_steps = math.ceil(self._announced * expected / whole)
        progress.note(f"split-half cosine {cosine:.2f} of {target_cosine:g}")

    def _factorize(self, engines: EngineGroup) -> tuple[dict[str, GradientFacts], dict[str, TruncatedSVD]]:
        """The facts of all the group's targets, and this rank's triplets, on the host: they must not crowd the device.

        Raises, on every rank, NoGradient where a gradient is zero and RunError where its owner cannot factorize it.
        """
        matrices, world = self._plan.matrices, self._world
        mine, owned = {}, {}
        num_owned = sum(matrices[name].owner == world.rank for name in engines.engine_of)
        engines.collect(world)  # who fails in a collective must not wait for the others in another
        with (
            world.together(),
            phase("factorize", num_owned, "targets", shown=world.is_main, nested=True) as progress,
            failing_by_name("factorize"),
        ):
            for name, found in engines.results(self._used.num_terms, self._request.config.init.damping):
                svd = found.svd
                owned[name] = TruncatedSVD(U_MK=svd.U_MK.cpu(), S_K=svd.S_K.cpu(), Vh_KN=svd.Vh_KN.cpu())
                mine[name] = asdict(GradientFacts.of(matrices[name], found))
                progress.advance()
        facts = {name: GradientFacts(**it) for part in world.all_json(mine) for name, it in part.items()}
        tiny = torch.finfo(torch.float32).tiny
        zero = [
            name
            for name, of_target in facts.items()
            if not (of_target.singular_values[0] > tiny or matrices[name].is_routed)
        ]
        if zero:
            raise NoGradient(zero, "change nothing in the loss")
        return facts, owned

    def _save_if_due(self) -> None:
        """Where nothing is half done: save if it is time, leave if that was asked for. A collective."""
        if self._checkpointer is not None:
            at = self._at
            is_new = bool(at.refinement or at.num_microbatches or at.num_groups_ahead)
            self._checkpointer.save_if_due(self._state_within if is_new else None)

    def _state_within(self) -> EngineState:
        """All that a later run needs to go on within a sweep; a collective."""
        states = [engines.save_state(self._world) for engines in self._engines]
        content = {
            "position": asdict(self._at),
            "data": asdict(self._used),
            "engines": [state.content for state in states],
            ORDER: self._plan.order.as_json(),
        }
        return EngineState(content, {name: tensor for state in states for name, tensor in state.tensors.items()})

    def _restore(self) -> None:
        """Go on from what an earlier run of the same work left."""
        if self._checkpointer is None:
            return
        found = self._checkpointer.found
        for saved in found.finished:
            facts = {name: GradientFacts(**it) for name, it in saved.content["facts"].items()}
            self._facts |= facts
            for name in facts:
                if self._plan.owners[name] == self._world.rank:
                    parts = {part.name: saved.tensors[f"{name}.{part.name}"] for part in fields(TruncatedSVD)}
                    self._owned[name] = TruncatedSVD(**parts)
            self._used = DataUsed(**saved.content["data"])
        # how these were put together in sweeps is not known any more
        self._state_bytes = max(map(self._plan.state_bytes, self._plan.groups[: len(found.finished)]), default=0)
        self._at, self._within_sweep = Position(group=len(found.finished)), found.newest
        if self._within_sweep is not None:
            self._at = Position.of_json(self._within_sweep.content["position"])
            self._used = DataUsed(**self._within_sweep.content["data"])


def _finished_state(
    facts: Mapping[str, GradientFacts],
    owned: Mapping[str, TruncatedSVD],
    used: DataUsed,
    order: Order,
) -> EngineState:
    """A group's results, as a later run takes them."""
    content = {
        "facts": {name: asdict(of_target) for name, of_target in facts.items()},
        "data": asdict(used),
        ORDER: order.as_json(),
    }
    tensors = {f"{name}.{part}": tensor for name, svd in owned.items() for part, tensor in vars(svd).items()}
    return EngineState(content, tensors)
