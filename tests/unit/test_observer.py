"""What stands between taps and engines asks of a whole pass."""

from __future__ import annotations

import itertools

import pytest
import torch

from loraga_dist.data.microbatches import Microbatch
from loraga_dist.engines import Matrix, StateHome
from loraga_dist.engines.group import EngineGroup
from loraga_dist.errors import RunError
from loraga_dist.gradients.observer import NoGradient, Observer
from loraga_dist.ranks.world import World

D, T = 32, 4
NAMES = ("vision", "text")


def engines(engine: str = "exact") -> EngineGroup:
    matrices = [Matrix(name=name, M=D, N=D, num_triplets=2, width=8, owner=0, engine=engine) for name in NAMES]
    return EngineGroup.of(matrices, home=StateHome(torch.device("cpu")), seed=0, dtype=torch.float32)


def show(observer: Observer, index: int, *names: str, scale: float = 1.0) -> None:
    ids = torch.zeros(1, T, dtype=torch.long)
    microbatch = Microbatch({"input_ids": ids, "labels": ids}, T - 1, index, ())
    observer.begin(microbatch)
    for name in names:
        observer.observe(name, torch.full((T, D), scale), torch.full((T, D), scale))
    observer.end(microbatch, torch.tensor(1.0))


def test_a_run_that_goes_on_refuses_nothing_that_the_run_before_may_have_seen() -> None:
    world, first = World.alone(), engines()
    observer = Observer(first, world)
    show(observer, 0, *NAMES)
    state = first.save_state(world)
    show(observer, 1, "text")
    observer.require_all_seen()
    second = engines()
    second.load_state(state.content, state.tensors, world)
    observer = Observer(second, world, goes_on=True)
    show(observer, 1, "text")
    observer.require_all_seen()


@pytest.mark.parametrize("first", [1.0, 1e20], ids=["in a refresh", "in the first microbatch"])
def test_a_sum_that_is_not_finite_in_the_midst_of_a_pass_is_named(first: float) -> None:
    observer = Observer(engines("sketch"), World.alone())
    with pytest.raises(RunError, match=f"^calibrate: the gradient of (vision|text), {D} x {D}.*: "):
        for index, scale in itertools.chain([(0, first)], ((index, 1e20) for index in range(1, 4))):
            show(observer, index, *NAMES, scale=scale)


def test_a_target_that_no_microbatch_of_a_whole_pass_reaches_is_refused() -> None:
    observer = Observer(engines(), World.alone())
    show(observer, 0, "text")
    show(observer, 1, "text")
    with pytest.raises(NoGradient) as caught:
        observer.require_all_seen()
    assert caught.value.names == ["vision"]
