"""Who factorizes what, and which targets share a sweep over the data: decided from shapes alone."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from loraga_dist.config import GradientConfig
from loraga_dist.engines import Matrix
from loraga_dist.engines.exact import state_bytes
from loraga_dist.schemes import Scheme
from loraga_dist.targets import Target


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The targets, their owner ranks, and the groups that are accumulated together, one sweep over the data each."""

    targets: list[Target]
    sweeps: list[list[Matrix]]

    @property
    def owners(self) -> dict[str, int]:
        return {matrix.name: matrix.owner for sweep in self.sweeps for matrix in sweep}

    @property
    def state_bytes_per_rank(self) -> int:
        """Engine state every rank holds during the largest sweep."""
        return max(sum(state_bytes(matrix.M, matrix.N) for matrix in sweep) for sweep in self.sweeps)


def make_plan(targets: Sequence[Target], config: GradientConfig, scheme: Scheme, world_size: int) -> Plan:
    """Cut the targets, in module order, into groups that fit the budget; balance each group's owners by SVD cost.

    Neighbours share a sweep, so that backward can stop at the group's lowest layer. A target larger than the budget
    gets a sweep of its own.
    """
    budget_bytes = config.state_budget_gib * 2**30
    most_targets = config.max_targets_in_flight or len(targets)
    groups: list[list[Target]] = [[]]
    group_bytes = 0
    for target in targets:
        needed = state_bytes(target.M, target.N)
        if groups[-1] and (len(groups[-1]) >= most_targets or group_bytes + needed > budget_bytes):
            groups.append([])
            group_bytes = 0
        groups[-1].append(target)
        group_bytes += needed
    loads = [(0, rank) for rank in range(world_size)]
    return Plan(targets=list(targets), sweeps=[_assign_owners(group, scheme, loads) for group in groups])


def _assign_owners(group: Sequence[Target], scheme: Scheme, loads: list[tuple[int, int]]) -> list[Matrix]:
    """Greedy bin packing: the costliest first, each to the rank with least work so far.

    loads: a heap of (work, rank), carried from group to group.
    """
    owners: dict[str, int] = {}
    for target in sorted(group, key=lambda target: (-target.M * target.N * target.r, target.name)):
        load, rank = heapq.heappop(loads)
        owners[target.name] = rank
        heapq.heappush(loads, (load + target.M * target.N * target.r, rank))
    return [
        Matrix(
            name=target.name,
            M=target.M,
            N=target.N,
            num_triplets=scheme.num_triplets(target.r),
            owner=owners[target.name],
        )
        for target in group
    ]
