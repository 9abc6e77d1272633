"""Targets by what they are: thousands of experts are a few lines of a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from loraga_dist.model.plan import Plan
from loraga_dist.model.targets import Target, kind_of
from loraga_dist.schemes import Scheme

_UNEVEN = 4
"""Routers send some experts so many times fewer tokens than the mean."""


class Kind(NamedTuple):
    """Targets that are alike."""

    module: str
    experts: int | None
    """In each stack, if they are experts' matrices."""
    experts_per_token: int | None
    M: int
    N: int
    r: int
    engine: str | None
    width: int | None
    state_bytes_each: int

    @classmethod
    def of(cls, target: Target, plan: Plan) -> Kind:
        matrix = plan.matrices.get(target.name)
        of_engine = (None, None, 0) if matrix is None else (matrix.engine, matrix.width, plan.state_bytes([matrix]))
        of_stack = (None, None) if target.stack is None else (target.stack.size, target.stack.num_chosen)
        return cls(kind_of(target.name), *of_stack, target.M, target.N, target.r, *of_engine)

    def tokens_each(self, num_tokens: int) -> int:
        """That a target is expected to see of so many, where routing is even."""
        if self.experts is None or self.experts_per_token is None:
            return num_tokens
        return num_tokens * self.experts_per_token // self.experts


def kinds_of(plan: Plan) -> dict[Kind, int]:
    """How many targets there are of each kind."""
    return Counter(Kind.of(target, plan) for target in plan.targets)


def experts_line(kinds: Mapping[Kind, int], num_tokens: int) -> str | None:
    """How many experts there are, and what each sees of so many tokens; None without experts."""
    stacks: Counter[tuple[int, int | None, int]] = Counter()
    for kind, count in kinds.items():
        if kind.experts is not None:
            seen = kind.tokens_each(num_tokens)
            stacks[kind.experts, kind.experts_per_token, seen] += count // kind.experts
    sees = ", which see {} of the tokens on average" if num_tokens else ""
    parts = (
        f"{count} stacks of {size}, {chosen} for a token{sees.format(seen)}"
        for (size, chosen, seen), count in stacks.items()
    )
    return "; ".join(parts) or None


def few_tokens(kinds: Mapping[Kind, int], num_tokens: int, scheme: Scheme) -> list[str]:
    """Of experts that are expected to see so few tokens that some have no start of their own: what to do."""
    return [
        f"{kind.module}: {seen} tokens an expert on average, and routing is uneven; of fewer than "
        f"{scheme.num_triplets(kind.r)} the start is arbitrary: use more calibration data"
        for kind in kinds
        if kind.experts is not None and (seen := kind.tokens_each(num_tokens)) < _UNEVEN * scheme.num_triplets(kind.r)
    ]
