"""Who factorizes what, and which targets share a sweep over the data: decided from shapes alone."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loraga_dist.config import GradientConfig
from loraga_dist.engines import ENGINES, Matrix
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
        return max(self.state_bytes(sweep) for sweep in self.sweeps)

    @staticmethod
    def state_bytes(sweep: Sequence[Matrix]) -> int:
        """Engine state every rank holds during one sweep."""
        return sum(_state_bytes(matrix) for matrix in sweep)

    @staticmethod
    def svd_cost(matrix: Matrix) -> int:
        """What owners are balanced by; grows as the flops of the factorization do."""
        return _svd_cost(matrix)


def make_plan(targets: Sequence[Target], config: GradientConfig, scheme: Scheme, world_size: int) -> Plan:
    """Cut the targets, in module order, into groups that fit the budget; balance each group's owners by SVD cost.

    Neighbours share a sweep, so that backward can stop at the group's lowest layer. A target larger than the budget
    gets a sweep of its own.
    """
    loads = [(0, rank) for rank in range(world_size)]
    groups = _cut([_matrix(target, config, scheme) for target in targets], config)
    return Plan(targets=list(targets), sweeps=[_assign_owners(group, loads) for group in groups])


def _matrix(target: Target, config: GradientConfig, scheme: Scheme) -> Matrix:
    num_triplets = scheme.num_triplets(target.r)
    widths = {
        kind: engine.width(num_triplets, target.M, target.N, config.oversampling) for kind, engine in ENGINES.items()
    }
    engine = config.engine
    if engine == "auto":
        # two sketches of that width would be as large as the gradient
        engine = "exact" if 2 * widths["sketch"] >= min(target.M, target.N) else "sketch"
    return Matrix(
        name=target.name,
        M=target.M,
        N=target.N,
        num_triplets=num_triplets,
        width=widths[engine],
        engine=engine,
        owner=0,
    )


def _cut(matrices: Sequence[Matrix], config: GradientConfig) -> list[list[Matrix]]:
    budget_bytes = config.state_budget_gib * 2**30
    most_targets = config.max_targets_in_flight or len(matrices)
    groups: list[list[Matrix]] = [[]]
    group_bytes = 0
    for matrix in matrices:
        needed = _state_bytes(matrix)
        if groups[-1] and (len(groups[-1]) >= most_targets or group_bytes + needed > budget_bytes):
            groups.append([])
            group_bytes = 0
        groups[-1].append(matrix)
        group_bytes += needed
    return groups


def _assign_owners(group: Sequence[Matrix], loads: list[tuple[int, int]]) -> list[Matrix]:
    """Greedy bin packing: the costliest first, each to the rank with least work so far.

    loads: a heap of (work, rank), carried from group to group.
    """
    owners: dict[str, int] = {}
    for matrix in sorted(group, key=lambda matrix: (-_svd_cost(matrix), matrix.name)):
        load, owners[matrix.name] = heapq.heappop(loads)
        heapq.heappush(loads, (load + _svd_cost(matrix), owners[matrix.name]))
    return [replace(matrix, owner=owners[matrix.name]) for matrix in group]


def _svd_cost(matrix: Matrix) -> int:
    """Grows as the flops of the factorization do: with M N K where the gradient is there, with (M + N) K^2 else."""
    size = matrix.M * matrix.N if matrix.engine == "exact" else (matrix.M + matrix.N) * matrix.width
    return size * matrix.width


def _state_bytes(matrix: Matrix) -> int:
    return ENGINES[matrix.engine].state_bytes(matrix.M, matrix.N, matrix.width)
