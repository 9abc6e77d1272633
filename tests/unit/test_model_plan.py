"""Groups, engines and owners of a plan, from shapes alone."""

from __future__ import annotations

import itertools

import pytest

from loraga_dist.config import MethodConfig
from loraga_dist.engines import ENGINES
from loraga_dist.model.plan import Plan, make_plan
from loraga_dist.model.targets import Target
from loraga_dist.ranks.balance import balance
from loraga_dist.schemes import SCHEMES

SHAPES = [(64, 64), (32, 64), (112, 64), (64, 112), (512, 768), (1024, 512)]


def targets(count: int, r: int = 4) -> list[Target]:
    shapes = itertools.islice(itertools.cycle(SHAPES), count)
    return [
        Target(
            name=f"layers.{i}", M=M, N=N, r=r, lora_alpha=8, scaling=8 / r, transposed=False, weight_key=f"layers.{i}.w"
        )
        for i, (M, N) in enumerate(shapes)
    ]


def plan_of(count: int, world_size: int = 1, scheme: str = "lora_ga", **gradient: object) -> Plan:
    # with a moment it is more triplets than the scheme takes
    init = {"scheme": scheme} | ({"whitening": "none"} if SCHEMES[scheme].whitens else {})
    config = {"init": init, "gradient": gradient}
    return make_plan(targets(count), MethodConfig.model_validate(config), world_size)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_target_has_one_owner_and_at_most_one_group(scheme: str, world_size: int) -> None:
    plan = plan_of(14, world_size, scheme, max_targets_in_flight=4)
    names = [target.name for target in plan.targets]
    assert plan.targets == targets(14)
    assert sorted(target.name for rank in range(world_size) for target in plan.owned(rank)) == sorted(names)
    assert plan.owners.keys() == plan.costs.keys() == set(names)
    in_groups = [matrix for group in plan.groups for matrix in group]
    if SCHEMES[scheme].source == "gradient":
        assert [matrix.name for matrix in in_groups] == names, "in module order, so that backward can stop early"
        assert [len(group) for group in plan.groups] == [4, 4, 4, 2]
        for matrix, target in zip(in_groups, plan.targets, strict=True):
            assert (matrix.M, matrix.N, matrix.owner) == (target.M, target.N, plan.owners[target.name])
            assert matrix.num_triplets == SCHEMES[scheme].num_triplets(target.r) <= matrix.width
    else:
        assert plan.groups == [] and plan.matrices == {}


def test_groups_fill_the_budget_and_no_more() -> None:
    whole = plan_of(30, engine="exact")
    each = [4 * (M * N + 16 * (2 * M + N)) for M, N in itertools.islice(itertools.cycle(SHAPES), 30)]
    assert len(whole.groups) == 1 and Plan.state_bytes(whole.groups[0]) == sum(each)
    for budget_bytes in (sum(each) // 2, sum(each) // 7, max(each)):
        plan = plan_of(30, engine="exact", state_budget_gib=budget_bytes / 2**30)
        sizes = [Plan.state_bytes(group) for group in plan.groups]
        assert max(sizes) <= budget_bytes
        for size, following in zip(sizes[:-1], plan.groups[1:], strict=True):
            assert size + Plan.state_bytes(following[:1]) > budget_bytes, "the next target would have fitted"
    alone = plan_of(30, engine="exact", state_budget_gib=1 / 2**30)
    assert [len(group) for group in alone.groups] == [1] * 30, "what is larger than the budget goes alone"


def test_more_budget_never_makes_more_groups() -> None:
    counts = [len(plan_of(60, state_budget_gib=2**power / 2**30).groups) for power in range(10, 31)]
    assert counts == sorted(counts, reverse=True) and counts[0] == 60 and counts[-1] == 1


def test_auto_takes_the_cheaper_engine_whose_state_fits() -> None:
    plan = plan_of(len(SHAPES), oversampling=8)
    assert [matrix.engine for matrix in plan.matrices.values()] == ["exact"] * 4 + ["sketch"] * 2
    assert {matrix.width for matrix in plan.matrices.values()} == {16}
    large = plan_of(len(SHAPES))
    assert [matrix.engine for matrix in large.matrices.values()] == ["exact"] * 5 + ["sketch"]
    assert [matrix.width for matrix in large.matrices.values()] == [40, 32, 40, 40, 40, 112]
    # the gradients of the last two are 1.5 and 2 MiB, their sketches less; the others are too small for a sketch
    for budget_mib in (1.4, 0.001):
        small = plan_of(len(SHAPES), state_budget_gib=budget_mib / 2**10)
        assert [matrix.engine for matrix in small.matrices.values()] == ["exact"] * 4 + ["sketch"] * 2


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_is_named_is_taken_everywhere(engine: str) -> None:
    assert {matrix.engine for matrix in plan_of(6, engine=engine).matrices.values()} == {engine}


def test_owners_are_balanced_over_all_groups_together() -> None:
    """Greedy bin packing leaves the busiest rank within one target's cost of the least busy one."""
    for gradient in ({}, {"max_targets_in_flight": 5}, {"engine": "exact", "max_targets_in_flight": 1}):
        plan = plan_of(40, 4, **gradient)
        loads = [sum(plan.costs[target.name] for target in plan.owned(rank)) for rank in range(4)]
        assert sum(loads) == sum(plan.costs.values())
        assert max(loads) - min(loads) <= max(plan.costs.values())
    exact, sketch = (plan_of(6, engine=engine).costs["layers.5"] for engine in ("exact", "sketch"))
    assert exact == 100 * 1024 * 512 * 40 + 250 * (1024 + 512) * 40**2
    assert sketch == 40 * (1024 + 512) * 112**2 + 600 * 112**3


@pytest.mark.parametrize("scheme", ["pissa", "kaiming"])
def test_owners_of_weights_are_balanced_by_their_size(scheme: str) -> None:
    plan = plan_of(40, 4, scheme)
    assert plan.costs == {target.name: target.M * target.N * target.r for target in plan.targets}
    loads = [sum(plan.costs[target.name] for target in plan.owned(rank)) for rank in range(4)]
    assert max(loads) - min(loads) <= max(plan.costs.values())


def test_a_rank_takes_its_largest_targets_first() -> None:
    for rank in range(3):
        sizes = [target.M * target.N for target in plan_of(20, 3, "pissa").owned(rank)]
        assert sizes == sorted(sizes, reverse=True)


def test_more_ranks_than_targets_leave_ranks_without() -> None:
    plan = plan_of(3, 8)
    assert sorted(len(plan.owned(rank)) for rank in range(8)) == [0] * 5 + [1] * 3


def test_balance_by_hand() -> None:
    loads = [0, 4, 0]
    dealt = balance(["a1", "b5", "c1", "d3", "e3"], lambda item: int(item[1]), loads)
    # b to rank 0; d to 2, e to 2 (3 < 4 < 5); a to 1 (4), c to 0 (all have 5, 5, 6)
    assert dealt == [["b5", "c1"], ["a1"], ["d3", "e3"]]
    assert loads == [6, 5, 6]
    assert balance(["a1"], lambda item: 1, loads) == [[], ["a1"], []] and loads == [6, 6, 6]
