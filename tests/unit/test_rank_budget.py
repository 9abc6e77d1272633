"""Parameters are spent where they hold most gradient energy: against all possible allocations, and in PEFT's hands."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from loraga_dist.config import LoraSection, SchemeConfig
from loraga_dist.errors import UserError
from loraga_dist.rank_budget import allocate, planned_targets, spend
from loraga_dist.targets import Target, peft_lora_config


def target(name: str, M: int, N: int, r: int = 4) -> Target:
    return Target(name=name, M=M, N=N, r=r, lora_alpha=8, scaling=8 / r, transposed=False)


@pytest.mark.parametrize("seed", range(20))
def test_no_allocation_of_equal_sizes_holds_more(seed: int) -> None:
    dice = random.Random(seed)
    energies = [sorted((dice.random() for _ in range(dice.randint(1, 4))), reverse=True) for _ in range(4)]
    budget = 7 * dice.randint(4, 14)
    ranks = allocate(budget, [7] * 4, energies)
    assert 7 * sum(ranks) <= budget

    def held(ranks: tuple[int, ...] | list[int]) -> float:
        return sum(sum(energy[:r]) for r, energy in zip(ranks, energies, strict=True))

    possible = itertools.product(*(range(1, len(energy) + 1) for energy in energies))
    assert held(ranks) == pytest.approx(max(held(ranks) for ranks in possible if 7 * sum(ranks) <= budget))


def test_energy_is_weighed_by_what_it_costs() -> None:
    # a rank of the large one holds more, a parameter of the small one does
    assert allocate(140, [100, 10], [[1.0, 0.5], [1.0, 0.1, 0.1, 0.1]]) == [1, 4]
    assert allocate(220, [100, 10], [[1.0, 0.5], [1.0, 0.1, 0.0]]) == [2, 2], "nothing is bought for no energy"


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_patterns_give_every_target_its_rank_and_the_same_scaling(use_rslora: bool) -> None:
    lora = LoraSection(r=4, lora_alpha=8, use_rslora=use_rslora)
    names = ["down", "mlp.down", "layers.1.mlp.down", "layers.11.mlp.down"]
    init = SchemeConfig(rank_budget=10 * 40)
    planned = planned_targets([target(name, 20, 20) for name in names], lora, init)
    assert [planned_one.r for planned_one in planned] == [8] * 4
    values = {name: [2.0 ** -(i * j) for j in range(16)] for i, name in enumerate(names)}
    targets, section = spend(planned, values, lora, init)
    assert sum(t.r for t in targets) == 10 and [t.name for t in targets] == names and targets[0].r == 7
    config: LoraConfig = peft_lora_config(section)
    scaling = 8 / math.sqrt(4) if use_rslora else 8 / 4
    for found in targets:  # the names end with one another
        key = get_pattern_key(config.rank_pattern.keys(), found.name)
        r, alpha = config.rank_pattern[key], config.alpha_pattern[key]
        assert (r, alpha) == (found.r, found.lora_alpha)
        assert alpha / (math.sqrt(r) if use_rslora else r) == pytest.approx(scaling, rel=1e-15) == found.scaling


def test_small_matrices_bound_their_ranks() -> None:
    targets = [target("a", 10, 30), target("b", 64, 64)]
    planned = planned_targets(targets, LoraSection(r=4), SchemeConfig(rank_budget=999))
    assert [found.r for found in planned] == [5, 8]


def test_a_budget_that_cannot_be_kept_is_refused() -> None:
    targets = [target("a", 10, 30), target("b", 64, 64)]
    with pytest.raises(UserError, match="init.rank_budget: 167: .*write 168 or more"):
        planned_targets(targets, LoraSection(), SchemeConfig(rank_budget=167))
    with pytest.raises(UserError, match="remove lora.rank_pattern"):
        planned_targets(targets, LoraSection(rank_pattern={"a": 2}), SchemeConfig(rank_budget=999))
    with pytest.raises(ValueError, match="concerns lora_ga and lora_one alone, not pissa; write null"):
        SchemeConfig(scheme="pissa", rank_budget=999)
