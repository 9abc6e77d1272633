"""One rank of test_sketch: synthetic (x, dy) streams through the sketch engine, against the dense sum of products.

usage: sketch_worker.py RESULT_JSON
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraga_dist.engines import ExactEngine, Matrix, SketchEngine, StateHome
from loraga_dist.engines.sketch import width
from loraga_dist.linalg import efficiency
from loraga_dist.ranks.session import leave_process
from loraga_dist.ranks.world import World

M, N, R = 384, 320, 4
RANKS_MOST = 4


@dataclass(frozen=True)
class Stream:
    """Global microbatches of RANKS_MOST parts, which any number of ranks that divides it can share."""

    microbatches: int
    tokens: int
    """Per part."""
    decay: float
    silent: int = 0
    """Microbatches at the start in which no token reaches the target."""
    second_task: int | None = None
    """The microbatch with which another gradient begins."""
    dtype: torch.dtype = torch.float32

    def part(self, index: int, part: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(1000 * index + part)
        dy_TM = torch.randn(self.tokens, M, generator=draw) * torch.arange(1, M + 1) ** -self.decay
        # x follows dy, so that their mean product has the decaying spectrum and single tokens are noise around it
        x_TN = dy_TM[:, :N] + 0.5 * torch.randn(self.tokens, N, generator=draw) * torch.arange(1, N + 1) ** -self.decay
        if index < self.silent:
            dy_TM = torch.zeros_like(dy_TM)
        if self.second_task is not None and index >= self.second_task:
            x_TN, dy_TM = x_TN.flip(1), 3 * dy_TM.flip(1)
        return x_TN.to(self.dtype), dy_TM.to(self.dtype)

    def gradient(self, microbatches: range) -> Tensor:
        G_MN = torch.zeros(M, N, dtype=torch.float64)
        for index in microbatches:
            for part in range(RANKS_MOST):
                x_TN, dy_TM = self.part(index, part)
                G_MN += dy_TM.double().T @ x_TN.double()
        return G_MN


STREAMS = {
    "plain": Stream(16, 64, 0.5),
    "bfloat16": Stream(16, 64, 0.5, dtype=torch.bfloat16),
    "few tokens": Stream(16, 2, 0.5),
    "late": Stream(16, 64, 0.5, silent=3),
    "two tasks in turn": Stream(16, 64, 0.5, second_task=8),
    "one microbatch": Stream(1, 64, 0.5),
    "many tokens a microbatch": Stream(2, 1024, 0.5, dtype=torch.bfloat16),
    "fewer tokens than triplets": Stream(1, 1, 0.5),
}


def matrix_owned_by(owner: int) -> Matrix:
    return Matrix(
        name="target", M=M, N=N, num_triplets=2 * R, width=width(2 * R, M, N, None), owner=owner, engine="sketch"
    )


def show(engine: ExactEngine | SketchEngine, stream: Stream, index: int, world: World) -> None:
    engine.begin_microbatch(index)
    for part in range(world.rank, RANKS_MOST, world.size):
        engine.observe("target", *stream.part(index, part))
    engine.end_microbatch(world)


def cosines(kind: type[ExactEngine] | type[SketchEngine], stream: Stream, world: World) -> dict:
    """The split-half cosine after every microbatch, asked for on the way, and the one that comes with the triplets."""
    engine = kind([matrix_owned_by(world.size - 1)], home=StateHome(torch.device("cpu")), seed=0, dtype=stream.dtype)
    asked: list[float | None] = []
    for index in range(stream.microbatches):
        show(engine, stream, index, world)
        asked += engine.split_half_cosines(world)
    truth = [
        torch.cosine_similarity(
            stream.gradient(range(0, seen, 2)).flatten(), stream.gradient(range(1, seen, 2)).flatten(), dim=0
        ).item()
        for seen in range(1, stream.microbatches + 1)
    ]
    found = [result.split_half_cosine for _, result in engine.factorize(world, 1)]
    return {"asked": asked, "truth": truth, "found": found}


def factorize(stream: Stream, world: World, refine_passes: int) -> dict:
    engine = SketchEngine(
        [matrix_owned_by(world.size - 1)], home=StateHome(torch.device("cpu")), seed=0, dtype=stream.dtype
    )
    for refinement in range(refine_passes + 1):
        if refinement:
            engine.begin_refinement(world)
        for index in range(stream.microbatches):
            show(engine, stream, index, world)
    for _, result in engine.factorize(world, 1):
        svd, G_MN = result.svd, stream.gradient(range(stream.microbatches))
        S = torch.linalg.svdvals(G_MN)
        identity = torch.eye(svd.width)
        return {
            "efficiency": efficiency(G_MN, svd.U_MK[:, R : 2 * R], svd.Vh_KN[:R].T),
            "captured": result.captured_energy,
            "captured_truth": (S[: 2 * R].square().sum() / S.square().sum()).item(),
            "singular_values": svd.S_K[: 2 * R].tolist(),
            "singular_values_truth": S[: 2 * R].tolist(),
            "orthonormality": max(
                (svd.U_MK.T @ svd.U_MK - identity).abs().max().item(),
                (svd.Vh_KN @ svd.Vh_KN.T - identity).abs().max().item(),
            ),
            "window_capture": result.window_capture,
        }
    return {}


def main() -> None:
    world = World.start()
    results = {
        f"{name}, {passes} refinements": factorize(stream, world, passes)
        for name, stream in STREAMS.items()
        for passes in (0, 1)
    }
    asked = {
        f"{kind.__name__}, {name}": cosines(kind, STREAMS[name], world)
        for kind in (ExactEngine, SketchEngine)
        for name in ("plain", "late")
    }
    if world.rank == world.size - 1:
        Path(sys.argv[1]).write_text(json.dumps({"factorized": results, "cosines": asked}))
    world.barrier()
    world.stop()


if __name__ == "__main__":
    main()
    leave_process(0)
