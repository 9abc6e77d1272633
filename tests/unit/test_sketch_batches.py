"""Equal matrices are refreshed together: as many small factorizations for many as for one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loraga_dist.engines import Matrix, SketchEngine, StateHome
from loraga_dist.engines.sketch_state import batch_size, union_bytes
from loraga_dist.ranks.world import World

M, N, K, MICROBATCHES = 96, 80, 16, 5
MOST = 8
FACTORIZATIONS = ("eig", "svd", "linalg_qr", "geqrf", "orgqr", "cholesky", "solve", "lu_factor", "inv", "lstsq")


class Calls(TorchDispatchMode):
    """Counts factorizations and solves, whichever function has them made."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(part in name for part in FACTORIZATIONS):
            self.of[name] += 1
        return func(*args, **(kwargs or {}))


def matrix(name: str, *, M: int = M, N: int = N, width: int = K) -> Matrix:
    return Matrix(name=name, M=M, N=N, num_triplets=4, width=width, owner=0, engine="sketch")


def calls_of(count: int, tokens: int) -> list[int]:
    """In each `end_microbatch`, then in `factorize`."""
    matrices = [matrix(f"layers.{number}") for number in range(count)]
    engine = SketchEngine(matrices, home=StateHome(torch.device("cpu")), seed=0, dtype=torch.float32)
    world, draw, found = World.alone(), torch.Generator().manual_seed(0), []
    for index in range(MICROBATCHES):
        engine.begin_microbatch(index)
        for each in matrices:
            engine.observe(each.name, torch.randn(tokens, N, generator=draw), torch.randn(tokens, M, generator=draw))
        with Calls() as calls:
            engine.end_microbatch(world)
        found.append(calls.of.total())
    with Calls() as calls:
        assert len(list(engine.factorize(world, MICROBATCHES))) == count
    return [*found, calls.of.total()]


@pytest.mark.parametrize("tokens", [32, 2], ids=["full rank", "fewer directions than columns"])
def test_the_calls_of_a_refresh_do_not_grow_with_the_number_of_equal_matrices(tokens: int) -> None:
    one, four, sixteen = (calls_of(count, tokens) for count in (1, 4, 16))
    assert one == four == sixteen
    start, *refreshes = one
    assert [calls > 0 for calls in refreshes] == [True, False, True, False, True], "windows double"
    assert max(refreshes) <= MOST
    assert start <= 4 * MOST, "two rounds of subspace iteration on either side"


def test_a_batch_takes_no_more_than_what_the_plan_counts() -> None:
    small, large = matrix("small"), matrix("large", M=16384, N=16384, width=1024)
    assert SketchEngine.refresh_bytes([]) == 0
    assert SketchEngine.refresh_bytes([small] * 3) == 3 * union_bytes(small)
    assert SketchEngine.refresh_bytes([small, large, small]) == union_bytes(large), "one after the other"
    assert batch_size(large) == 1 and union_bytes(large) > batch_size(small) * union_bytes(small)
    most = batch_size(small)
    assert SketchEngine.refresh_bytes([small] * (most + 1)) == most * union_bytes(small)


def test_one_that_is_not_finite_is_named_among_its_equals() -> None:
    matrices = [matrix(f"layers.{number}") for number in range(3)]
    engine = SketchEngine(matrices, home=StateHome(torch.device("cpu")), seed=0, dtype=torch.float32)
    for index in range(2):
        engine.begin_microbatch(index)
        for number, each in enumerate(matrices):
            dy_TM = torch.ones(4, M)
            dy_TM[0, 0] = torch.nan if index and number == 1 else 1
            engine.observe(each.name, torch.ones(4, N), dy_TM)
        if not index:
            engine.end_microbatch(World.alone())
    with pytest.raises(ValueError, match="NaN") as caught:
        engine.end_microbatch(World.alone())
    assert caught.value.__notes__ == [f"of layers.1, {M} x {N}"]


class Counted(World):
    """Counts sums over ranks."""

    sums = 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        Counted.sums += 1
        return super().sum_(tensor)


@pytest.mark.parametrize(("is_routed", "expected"), [(False, [1, 0, 0]), (True, [1, 1, 1])])
def test_ranks_ask_each_other_only_about_what_they_cannot_know(is_routed: bool, expected: list[int]) -> None:
    matrices = [replace(matrix(f"layers.{number}"), is_routed=is_routed) for number in range(2)]
    engine = SketchEngine(matrices, home=StateHome(torch.device("cpu")), seed=0, dtype=torch.float32)
    found = []
    for index in range(len(expected)):
        Counted.sums = 0
        engine.begin_microbatch(index)
        for each in matrices:
            engine.observe(each.name, torch.randn(4, N), torch.randn(4, M))
        engine.end_microbatch(Counted(0, 1, 0, torch.device("cpu")))
        found.append(Counted.sums)
    assert found == expected
