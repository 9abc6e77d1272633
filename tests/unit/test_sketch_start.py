"""The sketch starts at the first token that counts, wherever that is."""

from __future__ import annotations

import torch

from loraga_dist.engines import ENGINES, Matrix, SketchEngine, StateHome
from loraga_dist.ranks.world import World

M, N, T = 96, 80, 700


def test_a_long_first_microbatch_without_supervision_leaves_the_start_to_the_next() -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    matrix = Matrix(name="target", M=M, N=N, num_triplets=8, width=16, owner=0, engine="sketch")
    engine = ENGINES["sketch"]([matrix], home=StateHome(world.device), seed=0, dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    x_TN, dy_TM = torch.randn(T, N, generator=draw), torch.randn(T, 8, generator=draw)
    dy_TM = dy_TM @ torch.randn(8, M, generator=draw)
    for index, scale in enumerate((0.0, 1.0)):
        engine.begin_microbatch(index)
        engine.observe("target", x_TN, scale * dy_TM)
        engine.end_microbatch(world)
    svd = dict(engine.factorize(world, T))["target"].svd.leading(8)
    G_MN = dy_TM.T @ x_TN / T
    torch.testing.assert_close(svd.U_MK * svd.S_K @ svd.Vh_KN, G_MN, rtol=0, atol=1e-4 * G_MN.abs().max().item())


def test_a_first_microbatch_in_parts_takes_no_more_than_all_at_once() -> None:
    """As an output head sees a long sequence."""
    world, tokens, parts = World.alone(), 4 * T, 28
    matrix = Matrix(name="target", M=M, N=N, num_triplets=8, width=16, owner=0, engine="sketch")
    draw = torch.Generator().manual_seed(0)
    inside_T8 = torch.randn(tokens, 8, generator=draw)
    x_TN = inside_T8 @ torch.randn(8, N, generator=draw) + 0.1 * torch.randn(tokens, N, generator=draw)
    dy_TM = inside_T8 @ torch.randn(8, M, generator=draw) + 0.1 * torch.randn(tokens, M, generator=draw)

    def found(parts: int) -> tuple[int, torch.Tensor]:
        engine = SketchEngine([matrix], home=StateHome(world.device), seed=0, dtype=torch.float32)
        engine.begin_microbatch(0)
        for x, dy in zip(x_TN.chunk(parts), dy_TM.chunk(parts), strict=True):
            engine.observe("target", x, dy)
        held = sum(rows.nbytes for pair in engine._states["target"].cold for rows in pair)
        engine.end_microbatch(world)
        svd = dict(engine.factorize(world, tokens))["target"].svd.leading(8)
        return held, svd.U_MK * svd.S_K @ svd.Vh_KN

    (held_bytes, in_parts), (at_once_bytes, at_once) = found(parts), found(1)
    assert held_bytes == at_once_bytes <= SketchEngine.cold_bytes(matrix, torch.float32, tokens)
    expected = dy_TM.T @ x_TN / tokens
    assert (in_parts - expected).norm() < 1.1 * (at_once - expected).norm() < 0.1 * expected.norm()
