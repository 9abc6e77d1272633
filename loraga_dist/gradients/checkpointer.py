"""When a run saves its state, what it was, and what of it a later run of the same work goes on from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from loraga_dist.engines.base import EngineState, Matrix
from loraga_dist.errors import Preempted, RunError, UserError
from loraga_dist.files.checkpoint import Checkpoint, CheckpointStore, Found
from loraga_dist.gradients.saved import require_finished, require_state
from loraga_dist.ranks.progress import Clock
from loraga_dist.ranks.stop import StopRequest
from loraga_dist.ranks.words import say
from loraga_dist.ranks.world import World, dotted

BEGAN = "began"
"""In a saved state: when the work began, as its clock has it."""

ORDER = "order"
"""In which the model is gone through: another number of ranks might choose another."""

_FORMAT = 9
"""Of saved states; one of another number is other work."""


class Checkpointer:
    """Saves a run's state between microbatches, keeps the groups it has finished, and gives both to the next run of the
    same work.

    work: what must be the same in both, as nested JSON. groups: of the plan. clock: saved with each state, and set on
    to what it was. Every rank calls every method.
    """

    def __init__(
        self,
        store: CheckpointStore,
        work: Mapping[str, Any],
        groups: Sequence[Sequence[Matrix]],
        clock: Clock,
        stop: StopRequest,
        minutes: float,
        world: World,
    ) -> None:
        self._store = store
        self.clock = clock
        self.work = {"format": _FORMAT, **work}
        self.groups = groups
        self._stop = stop
        self._seconds = 60 * minutes
        self._world = world
        self._saved_at = time.monotonic()
        self.found = Found([], None, [])
        """What an earlier run of the same work left."""

    def start_over(self) -> None:
        """Forget what an earlier run left. Raises UserError where something else stands in its place."""
        self._store.require_ours()
        self._store.clear()
        self._world.barrier()

    def look(self) -> None:
        """Find what an earlier run left. Raises UserError, naming what differs, when that was other work."""
        self._store.require_ours()
        found = self._store.read(self._check)
        if self._world.is_main:
            for line in found.problems:
                say(f"loraga-dist: checkpoint: {line}")
        last = found.newest or (found.finished[-1] if found.finished else None)
        if last is None:
            return
        theirs, ours = dict(dotted(last.content["work"])), dict(dotted(self.work))
        differing = _differing(theirs, ours)
        with self._world.together():
            if differing:
                key = differing[0]
                raise UserError(
                    "resume",
                    "auto",
                    f"{last.path} was saved with {key} {theirs.get(key)!r} and now it is {ours.get(key)!r}; write "
                    "resume: never to start over, or the old value to go on",
                )
        if self._world.is_main:
            say(f"loraga-dist: going on from {last.path}")
        self.found = found
        self.clock.go_on_from(last.content["seconds"])

    def _check(self, saved: Checkpoint, num_finished: int | None) -> None:
        """Raise an exception for what this work did not write; of other work nothing is known, and it is refused."""
        if _differing(dict(dotted(saved.content["work"])), dict(dotted(self.work))):
            return
        if num_finished is None:
            require_finished(saved, self.groups[int(saved.path.name.split("-")[1])])
        else:
            require_state(saved, self.groups, num_finished)

    def save_if_due(self, state: Callable[[], EngineState] | None) -> None:
        """Save if it is time; None: nothing is new. Raises Preempted, on all ranks, when one was asked to stop."""
        due = time.monotonic() - self._saved_at > self._seconds
        wanted = torch.tensor([self._stop.signal_name is not None, due], device=self._world.device, dtype=torch.int32)
        asked, due = self._world.max_(wanted).tolist()
        if state is not None and (asked or due):
            made = state()
            self._store.save(made.content | self._of_run, made.tensors)
            self._saved_at = time.monotonic()
        if asked:
            self.leave()

    def finish_group(self, state: EngineState) -> None:
        self._store.finish(state.content | self._of_run, state.tensors)
        self._saved_at = time.monotonic()

    @property
    def _of_run(self) -> dict[str, Any]:
        return {"work": self.work, BEGAN: self.clock.began.isoformat(), "seconds": self.clock.seconds}

    def leave_here_if_asked(self) -> None:
        """Within `World.together`: raises Preempted if this rank was asked to stop; the others follow at its end."""
        if self._stop.signal_name is not None:
            self.leave()

    def leave_if_asked(self) -> None:
        """Between phases, where nothing new is to be saved; raises Preempted on all ranks."""
        self.save_if_due(None)

    def leave(self) -> None:
        saved = self._store.holds_work
        error = Preempted(
            f"stopped by {self._stop.signal_name or 'a request to another rank'}; the same command "
            + (f"goes on from {self._store.directory}" if saved else "starts over: there was nothing to save")
        )
        error.on_all_ranks = True
        raise error

    def require_same_base(self, before: Mapping[str, str], now: Mapping[str, str]) -> None:
        """On rank 0: raise RunError, with nothing left to go on from, if the base is no longer the one of this work.

        before, now: its `base_identity` when it was read, and at the end.
        """
        if changed := _differing(before, now):
            self._store.clear()  # what was saved may be of both, too
            problem = f"the base changed during the run ({', '.join(changed[:5])}), which may be of both models now"
            raise RunError(f"{problem}; run again, on a copy that nobody writes to")

    def done(self) -> None:
        """The work is finished: nothing is left to go on from."""
        self._store.clear()


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
