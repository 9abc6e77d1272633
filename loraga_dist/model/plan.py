"""Who factorizes what, and which targets are accumulated together: decided from shapes alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loraga_dist.config import GradientConfig, MethodConfig
from loraga_dist.engines import ENGINES, USUAL_AMOUNT, Amount, Matrix
from loraga_dist.model.blocks import MODEL_ORDER, Order
from loraga_dist.model.targets import Target
from loraga_dist.ranks.balance import balance
from loraga_dist.schemes import SCHEMES, Scheme

BEYOND = 40
"""Triplets of a gradient that a regression is made from, beside those that the scheme takes of it: with 48 in all it
has 0.9998 of what it has with every one (docs/LOG.md)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The targets, their owner ranks, and the groups that are accumulated together."""

    scheme: Scheme
    targets: list[Target]
    order: Order
    groups: list[list[Matrix]]
    """Each of one stage of the order, in the order in which stages go backward. None where the scheme takes no
    gradient."""
    owners: dict[str, int]
    costs: dict[str, int]
    """What owners are balanced by, per target; grows as the flops of the factorization do."""

    @functools.cached_property
    def matrices(self) -> dict[str, Matrix]:
        """Of all groups, by target name."""
        return {matrix.name: matrix for group in self.groups for matrix in group}

    def owned(self, rank: int) -> list[Target]:
        """In the order of their sizes, so that all ranks' next ones are much alike."""
        mine = [target for target in self.targets if self.owners[target.name] == rank]
        return sorted(mine, key=lambda target: -target.M * target.N)

    @staticmethod
    def state_bytes(group: Sequence[Matrix]) -> int:
        """Engine state every rank holds for one group."""
        return sum(ENGINES[matrix.engine].state_bytes(matrix) + matrix.moment_bytes for matrix in group)


def make_plan(
    targets: Sequence[Target],
    config: MethodConfig,
    world_size: int,
    order: Order = MODEL_ORDER,
    amount: Amount = USUAL_AMOUNT,
) -> Plan:
    """Cut the targets of each stage into groups that fit the budget; balance each group's owners by SVD cost.

    In model order neighbours share a sweep over the data, so that its backward can stop at the group's lowest layer. A
    target larger than the budget gets a group of its own. A scheme that takes no gradient needs no group, only owners.
    amount: of calibration data, by which engine `auto` decides.
    """
    scheme, gradient = SCHEMES[config.init.scheme], config.gradient
    if scheme.source != "gradient":
        groups = []
        costs_of_groups = [{target.name: scheme.factorization_cost(target.M, target.N, target.r) for target in targets}]
    else:
        alike: dict[tuple[float, ...], Matrix] = {}
        of_stage: dict[int, list[Matrix]] = {}
        for target in targets:
            key = (target.M, target.N, target.r, target.is_routed, target.row_share)
            if key not in alike:
                alike[key] = _matrix(target, config, amount)
            of_stage.setdefault(order.stage_of(target.name), []).append(replace(alike[key], name=target.name))
        groups = [group for stage in sorted(of_stage, reverse=True) for group in _cut(of_stage[stage], gradient)]
        costs_of_groups = [
            {
                matrix.name: ENGINES[matrix.engine].factorization_cost(matrix) + matrix.regression_cost
                for matrix in group
            }
            for group in groups
        ]
    loads = [0] * world_size
    costs, owners = {}, {}
    for of_group in costs_of_groups:
        costs |= of_group
        dealt = balance(sorted(of_group), of_group.__getitem__, loads)
        owners |= {name: rank for rank, names in enumerate(dealt) for name in names}
    groups = [[replace(matrix, owner=owners[matrix.name]) for matrix in group] for group in groups]
    return Plan(scheme=scheme, targets=list(targets), order=order, groups=groups, owners=owners, costs=costs)


def _matrix(target: Target, config: MethodConfig, amount: Amount) -> Matrix:
    gradient, moment_shape = config.gradient, config.init.moment_shape(target.N)
    num_triplets = SCHEMES[config.init.scheme].num_triplets(target.r)
    if moment_shape is not None:
        num_triplets = min(num_triplets + BEYOND, target.M, target.N)

    def with_engine(name: str) -> Matrix:
        return Matrix(
            name=target.name,
            M=target.M,
            N=target.N,
            num_triplets=num_triplets,
            width=ENGINES[name].width(num_triplets, target.M, target.N, gradient.oversampling),
            engine=name,
            owner=0,
            moment_shape=moment_shape,
            is_routed=target.is_routed,
            row_share=target.row_share,
        )

    amount = replace(amount, num_tokens=int(amount.num_tokens * target.row_share))
    if gradient.engine != "auto":
        return with_engine(gradient.engine)
    suiting = [matrix for matrix in map(with_engine, ENGINES) if ENGINES[matrix.engine].suits(matrix)]
    fitting = [matrix for matrix in suiting if Plan.state_bytes([matrix]) <= gradient.state_budget_gib * 2**30]
    if not fitting:
        return min(suiting, key=lambda matrix: Plan.state_bytes([matrix]))
    return min(fitting, key=lambda matrix: ENGINES[matrix.engine].cost(matrix, amount))


def sweep_end(plan: Plan, config: GradientConfig, first: int, *, in_one_chunk: bool, looks: bool) -> int:
    """Say up to which group a sweep from `first` on goes; one at least.

    in_one_chunk: all data is, and is kept for one group after the other; else groups that see the data together, within
    the budget, save passes. looks: the first sweep may end early, and all its groups are to agree to that.
    """
    if in_one_chunk and not (looks and first == 0):
        return first + 1
    most_targets = config.max_targets_in_flight or len(plan.targets)
    end, num_targets, num_bytes = first, 0, 0
    while end < len(plan.groups):
        num_targets += len(plan.groups[end])
        num_bytes += Plan.state_bytes(plan.groups[end])
        if end > first and (num_targets > most_targets or num_bytes > config.state_budget_gib * 2**30):
            break
        end += 1
    return end


def _cut(matrices: Sequence[Matrix], config: GradientConfig) -> list[list[Matrix]]:
    budget_bytes = config.state_budget_gib * 2**30
    most_targets = config.max_targets_in_flight or len(matrices)
    groups: list[list[Matrix]] = [[]]
    group_bytes = 0
    for matrix in matrices:
        needed = Plan.state_bytes([matrix])
        if groups[-1] and (len(groups[-1]) >= most_targets or group_bytes + needed > budget_bytes):
            groups.append([])
            group_bytes = 0
        groups[-1].append(matrix)
        group_bytes += needed
    return groups
