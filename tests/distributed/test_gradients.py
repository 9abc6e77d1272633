"""The gradient of every Linear equals an unsharded float32 reference, however it is sharded and recomputed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
from builders import save_data, save_model
from outputs import relative
from pieces import PROJECTIONS, autograd_gradients, exact_gradients, load, microbatches_of
from ranks import run_on_ranks
from torch import Tensor

from loraga_dist.config import GradientConfig
from loraga_dist.ranks.world import World

WAYS = [
    *(
        GradientConfig(order="model", checkpointing=checkpointing, max_targets_in_flight=in_flight)
        for checkpointing, in_flight in (*itertools.product(("non_reentrant", "none"), (None, 6)), ("non_reentrant", 1))
    ),
    *(GradientConfig(order="block", max_targets_in_flight=in_flight) for in_flight in (None, 3, 1)),
]
"""In flight are all 22 targets, or those of a layer, some of them, or each alone."""


@dataclass(frozen=True)
class Part:
    """What one rank had: tokens, and by way its targets' gradients and what was left behind on parameters."""

    num_tokens: int
    gradients: list[dict[str, Tensor]]
    left_gathered: list[str]
    left_with_grad: list[str]


def gradients_of_rank(model_dir: Path, data: Path) -> Part:
    world = World.start()
    loaded = load(model_dir, world)
    targets = loaded.targets([*PROJECTIONS, "lm_head"])
    microbatches = microbatches_of(model_dir, data, world.rank, world.size)
    part = Part(sum(microbatch.num_supervised_tokens for microbatch in microbatches), [], [], [])
    for way in WAYS:
        found = exact_gradients(loaded.model, loaded.sharding, targets, microbatches, way)
        part.gradients.append({name: G_MN.clone() for name, G_MN in found})
        for name, parameter in loaded.model.named_parameters():
            if world.size > 1 and parameter.ds_status.name != "NOT_AVAILABLE":
                part.left_gathered.append(name)
            if parameter.grad is not None:
                part.left_with_grad.append(name)
    return part


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_linear_matches_the_unsharded_reference(world_size: int, tmp_path: Path) -> None:
    model, data = save_model(tmp_path / "model"), save_data(tmp_path / "data.jsonl", rows=7)
    parts: list[Part] = run_on_ranks(gradients_of_rank, world_size, model, data, timeout_seconds=280)
    expected = autograd_gradients(model, microbatches_of(model, data))

    assert len({part.num_tokens for part in parts}) == world_size, "ranks should hold different numbers of tokens"
    for i, way in enumerate(WAYS):
        found = [(name, G_MN) for part in parts for name, G_MN in part.gradients[i].items()]
        assert len(found) == len(dict(found)) == 3 * 7 + 1, way
        for name, G_MN in found:
            # float32 sums over some 200 tokens, in another order: the difference is about 1e-6
            assert relative(G_MN, expected[name]) < 1e-5, (way, name)
    assert not any(part.left_gathered or part.left_with_grad for part in parts)
