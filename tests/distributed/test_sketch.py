"""The sketch engine against dense sums, on streams that are hard for it, and on 1, 2 and 4 ranks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from ranks import run_on_ranks
from subspace import efficiency
from torch import Tensor

from loraga_dist.artifacts.warnings import LOW_WINDOW_CAPTURE
from loraga_dist.engines import ExactEngine, Matrix, SketchEngine, StateHome
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


@dataclass(frozen=True)
class Stated:
    """docs/BENCHMARKS.md for gradients of this kind at r = 4: efficiencies, and how far off the captured energy is."""

    one_pass: float
    refined: float
    captured_off: float
    singular_values_off: float = 0.01


# `captured_off` is the mean over targets there; a single target here may be off by twice that
ALL_TOKENS = Stated(0.9999, 0.99999, 2 * 0.0204)  # quickstart model, all tokens, whose worst target has 0.9991
FEW_TOKENS = Stated(0.9949, 0.99999, 2 * 0.0304, 0.15)  # quickstart model, 1 token a sequence
STATED = dict.fromkeys(STREAMS, ALL_TOKENS) | {
    "few tokens": FEW_TOKENS,
    "two tasks in turn": Stated(0, 0.9985, 2 * 0.0425),  # two tasks, sorted; one pass is warned of
}


@dataclass(frozen=True)
class Factorized:
    """One stream's sketch against the dense sum."""

    efficiency: float
    captured: float
    captured_truth: float
    singular_values: list[float]
    singular_values_truth: list[float]
    orthonormality: float
    window_capture: float | None


@dataclass(frozen=True)
class Cosines:
    """The split-half cosine after every microbatch, asked for on the way, and the one that comes with the triplets."""

    asked: list[float | None]
    truth: list[float]
    found: float | None


def matrix_owned_by(owner: int) -> Matrix:
    K = SketchEngine.width(2 * R, M, N, None)
    return Matrix(name="target", M=M, N=N, num_triplets=2 * R, width=K, owner=owner, engine="sketch")


def show(engine: ExactEngine | SketchEngine, stream: Stream, index: int, world: World) -> None:
    engine.begin_microbatch(index)
    for part in range(world.rank, RANKS_MOST, world.size):
        engine.observe("target", *stream.part(index, part))
    engine.end_microbatch(world)


def cosines(kind: type[ExactEngine] | type[SketchEngine], stream: Stream, world: World) -> Cosines | None:
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
    of_owned = [Cosines(asked, truth, result.split_half_cosine) for _, result in engine.factorize(world, 1)]
    return of_owned[0] if of_owned else None


def factorize(stream: Stream, world: World, refine_passes: int) -> Factorized | None:
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
        return Factorized(
            efficiency=efficiency(G_MN, svd.U_MK[:, R : 2 * R], svd.Vh_KN[:R].T),
            captured=result.captured_energy,
            captured_truth=(S[: 2 * R].square().sum() / S.square().sum()).item(),
            singular_values=svd.S_K[: 2 * R].tolist(),
            singular_values_truth=S[: 2 * R].tolist(),
            orthonormality=max(
                (svd.U_MK.T @ svd.U_MK - identity).abs().max().item(),
                (svd.Vh_KN @ svd.Vh_KN.T - identity).abs().max().item(),
            ),
            window_capture=result.window_capture,
        )
    return None


def results_of_rank() -> dict:
    """By stream and number of refine passes, and by engine and stream; None for a rank that owns nothing."""
    world = World.start()
    factorized = {
        (name, passes): factorize(stream, world, passes) for name, stream in STREAMS.items() for passes in (0, 1)
    }
    return factorized | {
        (kind.__name__, name): cosines(kind, STREAMS[name], world)
        for kind in (ExactEngine, SketchEngine)
        for name in ("plain", "late")
    }


@pytest.fixture(scope="module", params=[1, 2, 4])
def results(request: pytest.FixtureRequest) -> dict:
    return run_on_ranks(results_of_rank, request.param)[-1]


@pytest.mark.parametrize("stream", STREAMS)
def test_efficiency_is_what_the_documents_state(results: dict, stream: str) -> None:
    assert results[stream, 0].efficiency >= STATED[stream].one_pass
    assert results[stream, 1].efficiency >= STATED[stream].refined


@pytest.mark.parametrize("passes", [0, 1])
@pytest.mark.parametrize("stream", STREAMS)
def test_what_it_says_of_itself_is_true(results: dict, stream: str, passes: int) -> None:
    result, stated = results[stream, passes], STATED[stream]
    assert result.orthonormality < 1e-4
    if (stream, passes) == ("two tasks in turn", 0):
        assert result.captured < 0.5, "of what it lost nothing is claimed"
        return
    assert result.captured == pytest.approx(result.captured_truth, abs=stated.captured_off)
    smallest = 1e-3 * result.singular_values_truth[0]
    truth = pytest.approx(result.singular_values_truth, rel=stated.singular_values_off, abs=smallest)
    assert result.singular_values == truth


def test_window_capture_falls_when_the_data_changes(results: dict) -> None:
    assert results["two tasks in turn", 0].window_capture < LOW_WINDOW_CAPTURE
    assert results["plain", 0].window_capture > LOW_WINDOW_CAPTURE
    assert results["late", 0].window_capture > LOW_WINDOW_CAPTURE
    assert results["one microbatch", 0].window_capture is None, "there is nothing to compare with"


@pytest.mark.parametrize("engine", ["ExactEngine", "SketchEngine"])
@pytest.mark.parametrize("stream", ["plain", "late"])
def test_halves_can_be_compared_at_any_time(results: dict, engine: str, stream: str) -> None:
    found = results[engine, stream]
    assert found.asked[0] is None, "a single microbatch has no halves"
    # halves are compared in a random subspace, which is off by some 0.02; of none there is nothing to compare
    assert found.asked[1:] == pytest.approx([cosine or None for cosine in found.truth[1:]], abs=0.04)
    assert found.asked[-1] == found.found, "asking does not change the answer"
