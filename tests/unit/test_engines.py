"""What holds for every engine of the table: whatever fails on an owner names its matrix."""

from __future__ import annotations

import pytest
import torch

from loraga_dist.engines import ENGINES, Matrix, StateHome
from loraga_dist.engines.group import EngineGroup
from loraga_dist.ranks.world import World


@pytest.mark.parametrize("name", ENGINES)
def test_a_gradient_that_cannot_be_factorized_names_its_matrix(name: str) -> None:
    M, N, T, world = 40, 30, 64, World.alone()
    width = ENGINES[name].width(4, M, N, 8)
    matrix = Matrix(name="layers.7.up_proj", M=M, N=N, num_triplets=4, width=width, owner=0, engine=name)
    engine = ENGINES[name]([matrix], home=StateHome(torch.device("cpu")), seed=0, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for index in range(2):
        engine.begin_microbatch(index)
        dy_TM = torch.randn(T, M, generator=generator)
        dy_TM[0] = torch.nan if index else 0.0
        engine.observe(matrix.name, torch.randn(T, N, generator=generator), dy_TM)
        if not index:
            engine.end_microbatch(world)
    with pytest.raises((RuntimeError, ValueError)) as caught:
        list(engine.factorize(world, 2 * T))
    assert caught.value.__notes__ == ["of layers.7.up_proj, 40 x 30"]


def test_one_engine_that_fails_keeps_none_of_a_group_from_its_collectives() -> None:
    M, N, T, world = 40, 30, 64, World.alone()
    matrices = [
        Matrix(name=name, M=M, N=N, num_triplets=4, width=ENGINES[name].width(4, M, N, 8), owner=0, engine=name)
        for name in ("exact", "sketch")
    ]
    group = EngineGroup.of(matrices, home=StateHome(torch.device("cpu")), seed=0, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    x_TN, dy_TM = torch.randn(T, N, generator=generator), torch.randn(T, M, generator=generator)
    group.begin_microbatch(0)
    group.observe("sketch", x_TN, dy_TM)
    group.observe("exact", x_TN, torch.full_like(dy_TM, torch.nan))
    group.end_microbatch(world)
    found = {}
    with pytest.raises(ValueError, match="NaN") as caught:
        for name, result in group.factorize(world, T):
            found[name] = result
    assert caught.value.__notes__ == ["of exact, 40 x 30"]
    S_K = torch.linalg.svdvals((dy_TM.double().T @ x_TN.double()) / T)
    assert torch.allclose(found["sketch"].svd.S_K[:4].double(), S_K[:4], rtol=1e-2)
