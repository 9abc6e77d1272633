"""Engine state kept on the host between two uses: the same factors, and nothing left where it should not be."""

from __future__ import annotations

import pytest
import torch

from loraga_dist.engines import ENGINES, GradientSVD, Matrix, StateHome
from loraga_dist.ranks.world import World

CPU = torch.device("cpu")
M, N = 160, 200


def factorize(kind: str, home: StateHome, *, refine: bool = False) -> GradientSVD:
    matrix = Matrix(name="target", M=M, N=N, num_triplets=8, width=24, owner=0, engine=kind)
    engine = ENGINES[kind]([matrix], home=home, seed=0, dtype=torch.bfloat16)
    world = World(0, 1, 0, CPU)
    for refining in (False, True) if refine else (False,):
        if refining:
            engine.begin_refinement(world)
        draw = torch.Generator().manual_seed(0)
        for index in range(5):
            engine.begin_microbatch(index)
            dy_TM = torch.randn(32, M, generator=draw) * torch.arange(1, M + 1) ** -1.0
            x_TN = torch.randn(32, N, generator=draw)
            engine.observe("target", x_TN.bfloat16(), dy_TM.bfloat16())
            engine.end_microbatch(world)
    return dict(engine.factorize(world, 160))["target"]


@pytest.mark.parametrize(("kind", "refine"), [("exact", False), ("sketch", False), ("sketch", True)])
def test_the_host_gives_identical_factors(kind: str, refine: bool) -> None:
    here = factorize(kind, StateHome(CPU), refine=refine)
    there = factorize(kind, StateHome(CPU, on_host=True), refine=refine)
    for name in ("U_MK", "S_K", "Vh_KN"):
        assert torch.equal(getattr(here.svd, name), getattr(there.svd, name)), name
    assert here.captured_energy == there.captured_energy


def test_what_is_kept_is_a_copy_and_takes_changes_back() -> None:
    home = StateHome(CPU, on_host=True)
    tensor = torch.zeros(3)
    kept = home.keep(tensor)
    fetched = home.fetch(kept)
    home.put_back(kept, fetched.add_(1))
    assert tensor.tolist() == [0, 0, 0] and home.fetch(kept).tolist() == [1, 1, 1]


@pytest.mark.parametrize("choice", ["auto", "device", "host"])
def test_without_an_accelerator_the_host_is_the_device(choice: str) -> None:
    assert StateHome.choose(choice, CPU, state_bytes=2**60, free_bytes=0) == StateHome(CPU)  # type: ignore[arg-type]
