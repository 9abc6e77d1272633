"""Parameters are spent where they hold most gradient energy: against all possible allocations, and in PEFT's hands."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from loraga_dist.config import LoraSection, SchemeConfig
from loraga_dist.errors import UserError
from loraga_dist.model.rank_budget import allocate, planned_targets, spend
from loraga_dist.model.selection import select_targets
from loraga_dist.model.targets import Target, peft_lora_config
from loraga_dist.schemes import SCHEMES


def target(name: str, M: int, N: int, r: int = 4) -> Target:
    return Target(name=name, M=M, N=N, r=r, lora_alpha=8, scaling=8 / r, transposed=False, weight_key=name)


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
def test_the_patterns_give_every_target_its_rank_and_the_same_scaling(use_rslora: bool, tmp_path: Path) -> None:
    lora = LoraSection(r=4, lora_alpha=8, use_rslora=use_rslora)
    # names that end one another, and one that a dot in a pattern would match
    names = ["down", "mlp.down", "layers.1.mlp.down", "mlp_down"]
    init = SchemeConfig(rank_budget=10 * 40)
    planned = planned_targets([target(name, 20, 20) for name in names], lora, init)
    assert [planned_one.r for planned_one in planned] == [8] * 4
    values = {name: [2.0 ** -(i * j) for j in range(16)] for i, name in enumerate(names)}
    targets, section = spend(planned, values, lora, init)
    assert sum(t.r for t in targets) == 10 and [t.name for t in targets] == names and targets[0].r == 7
    peft_lora_config(section).save_pretrained(str(tmp_path))
    config = LoraConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, LoraConfig) and list(config.rank_pattern) == sorted(config.rank_pattern)
    scaling = 8 / math.sqrt(4) if use_rslora else 8 / 4
    for found in targets:  # the names end with one another
        key = get_pattern_key(list(config.rank_pattern), found.name)
        of_rank = [other.name for other in targets if other.r == found.r]
        assert [name for name in names if get_pattern_key([key], name) == key] == of_rank
        r, alpha = config.rank_pattern[key], config.alpha_pattern[key]
        assert (r, alpha) == (found.r, found.lora_alpha)
        assert alpha / (math.sqrt(r) if use_rslora else r) == pytest.approx(scaling, rel=1e-15) == found.scaling


def test_directions_below_rounding_are_not_bought() -> None:
    lora, init = LoraSection(r=4), SchemeConfig(rank_budget=9999)
    planned = planned_targets([target("a", 20, 30), target("b", 20, 30)], lora, init)
    noise = [3e-7 * 0.9**i for i in range(13)]
    targets, _ = spend(planned, {"a": [1.0] * 16, "b": [1.0, 1.0, 0.5, *noise]}, lora, init)
    assert [found.r for found in targets] == [8, 2]


def test_a_rank_whose_directions_are_not_all_there_is_not_bought() -> None:
    """As in factors/ of an earlier run with a small lora.r."""
    lora, init = LoraSection(r=4, lora_alpha=8), SchemeConfig(rank_budget=10**6)
    planned = planned_targets([target("a", 40, 30), target("b", 40, 30)], lora, init)
    targets, _ = spend(planned, {"a": [1.0] * 16, "b": [1.0] * 5}, lora, init)
    assert [found.r for found in targets] == [8, 2]


def test_small_matrices_bound_their_ranks() -> None:
    targets = [target("a", 10, 30), target("b", 64, 64), target("c", 6, 30)]
    planned = planned_targets(targets, LoraSection(r=4), SchemeConfig(rank_budget=999))
    assert [found.r for found in planned] == [5, 8, 3]


@pytest.mark.parametrize("rows", [6, 1])
def test_a_matrix_too_small_for_lora_r_is_in_unless_rank_one_does_not_fit(rows: int) -> None:
    class Model(torch.nn.Module):
        prepare_inputs_for_generation = None  # PEFT asks causal models for it

        def __init__(self) -> None:
            super().__init__()
            self.wide, self.flat = torch.nn.Linear(50, 40), torch.nn.Linear(50, rows)

    lora = LoraSection(r=4, target_modules=["wide", "flat"])
    num_triplets = SCHEMES["lora_ga"].num_triplets
    with pytest.raises(UserError, match="flat is"):
        select_targets(Model(), lora, num_triplets)
    if rows == 1:
        with pytest.raises(UserError, match=r"flat is 1 x 50 .*; add it to lora.exclude_modules"):
            select_targets(Model(), lora, num_triplets, any_rank=True)
    else:
        found = select_targets(Model(), lora, num_triplets, any_rank=True).targets
        assert [target.r for target in planned_targets(found, lora, SchemeConfig(rank_budget=999))] == [8, 3]


def test_a_budget_that_cannot_be_kept_is_refused() -> None:
    targets = [target("a", 10, 30), target("b", 64, 64)]
    with pytest.raises(UserError, match="init.rank_budget: 167: .*write 168 or more"):
        planned_targets(targets, LoraSection(), SchemeConfig(rank_budget=167))
    with pytest.raises(UserError, match="remove lora.rank_pattern"):
        planned_targets(targets, LoraSection(rank_pattern={"a": 2}), SchemeConfig(rank_budget=999))
    with pytest.raises(ValueError, match="lora_one and rrr and rrr_step alone, not pissa; write null"):
        SchemeConfig(scheme="pissa", rank_budget=999)
