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

from loraga_dist.cli import leave_process
from loraga_dist.distributed import World
from loraga_dist.engines import Matrix, SketchEngine
from loraga_dist.engines.sketch import width
from loraga_dist.linalg import efficiency

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
    dtype: torch.dtype = torch.float32

    def part(self, index: int, part: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(1000 * index + part)
        dy_TM = torch.randn(self.tokens, M, generator=draw) * torch.arange(1, M + 1) ** -self.decay
        # x follows dy, so that their mean product has the decaying spectrum and single tokens are noise around it
        x_TN = dy_TM[:, :N] + 0.5 * torch.randn(self.tokens, N, generator=draw) * torch.arange(1, N + 1) ** -self.decay
        if index < self.silent:
            dy_TM = torch.zeros_like(dy_TM)
        return x_TN.to(self.dtype), dy_TM.to(self.dtype)


STREAMS = {
    "plain": Stream(16, 64, 0.5),
    "bfloat16": Stream(16, 64, 0.5, dtype=torch.bfloat16),
    "few tokens": Stream(16, 2, 0.5),
    "late": Stream(16, 64, 0.5, silent=3),
    "one microbatch": Stream(1, 64, 0.5),
    "many tokens a microbatch": Stream(2, 1024, 0.5, dtype=torch.bfloat16),
    "fewer tokens than triplets": Stream(1, 1, 0.5),
}


def factorize(stream: Stream, world: World, refine_passes: int) -> dict:
    matrix = Matrix(
        name="target",
        M=M,
        N=N,
        num_triplets=2 * R,
        width=width(2 * R, M, N, None),
        owner=world.size - 1,
        engine="sketch",
    )
    engine = SketchEngine([matrix], device=torch.device("cpu"), seed=0, dtype=stream.dtype)
    for refinement in range(refine_passes + 1):
        if refinement:
            engine.begin_refinement(world)
        for index in range(stream.microbatches):
            engine.begin_microbatch(index)
            for part in range(world.rank, RANKS_MOST, world.size):
                engine.observe("target", *stream.part(index, part))
            engine.end_microbatch(world)
    for _, result in engine.factorize(world, 1):
        G_MN = torch.zeros(M, N, dtype=torch.float64)
        for index in range(stream.microbatches):
            for part in range(RANKS_MOST):
                x_TN, dy_TM = stream.part(index, part)
                G_MN += dy_TM.double().T @ x_TN.double()
        svd = result.svd
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
    if world.rank == world.size - 1:
        Path(sys.argv[1]).write_text(json.dumps(results))
    world.barrier()
    world.stop()


if __name__ == "__main__":
    main()
    leave_process(0)
