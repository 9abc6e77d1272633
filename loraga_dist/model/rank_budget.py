"""Ranks by layer: so many adapter parameters in all, spent where they capture most of the gradients' energy."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from loraga_dist.config import LoraSection, SchemeConfig
from loraga_dist.errors import UserError
from loraga_dist.linalg import numerical_rank
from loraga_dist.model.targets import Target, layers_of
from loraga_dist.schemes import SCHEMES, lora_scaling

LARGEST = 2
"""No target gets more than this times `lora.r`: engines must know beforehand how many directions to look for."""


def planned_targets(targets: Sequence[Target], lora: LoraSection, init: SchemeConfig) -> list[Target]:
    """The targets with the largest ranks they may get, for which engines, memory and disk are planned.

    Without `init.rank_budget` they are as they were. Raises UserError for a budget that cannot be kept.
    """
    if init.rank_budget is None:
        return list(targets)
    if lora.rank_pattern or lora.alpha_pattern:
        key = "lora.rank_pattern" if lora.rank_pattern else "lora.alpha_pattern"
        raise UserError("init.rank_budget", init.rank_budget, f"decides ranks and alphas itself; remove {key}")
    least = sum(target.M + target.N for target in targets)
    if init.rank_budget < least:
        raise UserError(
            "init.rank_budget",
            init.rank_budget,
            f"is less than rank 1 of the {len(targets)} targets takes; write {least} or more, or "
            "leave targets out with lora.exclude_modules",
        )
    num_triplets = SCHEMES[init.scheme].num_triplets
    planned = []
    for target in targets:
        smaller = min(target.M, target.N)
        ranks = range(1, min(LARGEST * lora.r, smaller) + 1)
        planned.append(_with_rank(target, lora, max(r for r in ranks if num_triplets(r) <= smaller)))
    return planned


def spend(
    planned: Sequence[Target], singular_values: Mapping[str, Sequence[float]], lora: LoraSection, init: SchemeConfig
) -> tuple[list[Target], LoraSection]:
    """The targets with the ranks that `init.rank_budget` buys, and the section with these as patterns.

    Every target keeps its scaling, that of `lora`. singular_values: of each gradient, descending; a target gets no rank
    that wants more of them than it has.
    """
    assert init.rank_budget is not None
    num_triplets = SCHEMES[init.scheme].num_triplets
    layers = list(layers_of(planned).values())  # of one rank: PEFT gives all experts of a parameter the same
    energies = []
    for members in layers:
        of_members = [_energies(target, singular_values[target.name], num_triplets) for target in members]
        energies.append([math.fsum(of_rank) for of_rank in zip(*of_members, strict=False)])
    ranks = allocate(init.rank_budget, [sum(it.M + it.N for it in members) for members in layers], energies)
    rank_of = {target.name: r for members, r in zip(layers, ranks, strict=True) for target in members}
    targets = [_with_rank(target, lora, rank_of[target.name]) for target in planned]
    # one pattern a rank: PEFT tries them all on every name, and Python keeps 512 compiled. ^ makes names whole ones
    of_rank = {target.r: target for target in targets}
    names = {r: sorted({target.pattern_name for target in targets if target.r == r}) for r in sorted(of_rank)}
    keys = {r: f"^(?:{'|'.join(map(re.escape, of_r))})" for r, of_r in names.items()}
    patterns = {
        "rank_pattern": {key: r for r, key in keys.items()},
        "alpha_pattern": {key: of_rank[r].lora_alpha for r, key in keys.items()},
    }
    return targets, lora.model_copy(update=patterns)


def _energies(target: Target, held: Sequence[float], num_triplets: Callable[[int], int]) -> list[float]:
    """What each further rank captures of a gradient's energy. held: its singular values, descending."""
    ends = [(num_triplets(r), num_triplets(r + 1)) for r in range(target.r) if num_triplets(r + 1) <= len(held)]
    # what lies below rounding would be bought in another order on another number of ranks
    values = held[: numerical_rank(torch.tensor(held), target.M, target.N)]
    return [math.fsum(value**2 for value in values[start:end]) for start, end in ends]


def allocate(budget: int, sizes: Sequence[int], energies: Sequence[Sequence[float]]) -> list[int]:
    """Ranks, 1 at least, with sum(rank * size) <= budget, by most energy per parameter first.

    energies: what each further rank of a target adds, never more than the one before; its length is the largest rank.
    Ranks that add nothing are not bought. The energy is the largest possible but for what the last parameters, too few
    for the next best rank, could have bought together.
    """
    ranks = [1] * len(sizes)
    left = budget - sum(sizes)
    assert left >= 0, "checked by planned_targets"

    def offer(i: int) -> tuple[float, int]:
        return -energies[i][ranks[i]] / sizes[i], i

    offers = [offer(i) for i in range(len(sizes)) if len(energies[i]) > 1]
    heapq.heapify(offers)
    while offers:
        gain, i = heapq.heappop(offers)
        if gain == 0 or sizes[i] > left:
            continue
        ranks[i] += 1
        left -= sizes[i]
        if ranks[i] < len(energies[i]):
            heapq.heappush(offers, offer(i))
    return ranks


def num_parameters(targets: Sequence[Target]) -> int:
    """Of all A and B together."""
    return sum(target.num_parameters for target in targets)


def _with_rank(target: Target, lora: LoraSection, r: int) -> Target:
    """The same scaling at another rank."""
    share = r / lora.r
    lora_alpha = lora.lora_alpha * (math.sqrt(share) if lora.use_rslora else share)
    return replace(target, r=r, lora_alpha=lora_alpha, scaling=lora_scaling(lora_alpha, r, lora.use_rslora))
