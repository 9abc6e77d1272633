"""What holds for every engine of the table: whatever fails on an owner names its matrix."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from loraga_dist.engines import ENGINES, USUAL_AMOUNT, Amount, Matrix, StateHome
from loraga_dist.engines.base import ERROR_COLUMNS, seeded_generator
from loraga_dist.engines.exact import ExactEngine
from loraga_dist.engines.group import EngineGroup
from loraga_dist.engines.product import multiplies_bfloat16
from loraga_dist.gradients.gradients import GradientFacts
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


def test_results_need_no_other_rank_and_a_failure_leaves_other_engines_theirs() -> None:
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
    group.collect(world)
    with pytest.raises(ValueError, match="NaN") as caught:
        list(group.results(T))
    assert caught.value.__notes__ == ["of exact, 40 x 30"]
    found = dict(group.engine_of["sketch"].results(T))
    S_K = torch.linalg.svdvals((dy_TM.double().T @ x_TN.double()) / T)
    assert torch.allclose(found["sketch"].svd.S_K[:4].double(), S_K[:4], rtol=1e-2)


@pytest.mark.parametrize("T", [8, 200])
def test_split_half_cosine_of_exact_is_near_the_gradients(T: int) -> None:
    """Few tokens and many are sketched by different products; the estimates are the same sketch."""
    M, N, world = 96, 80, World.alone()
    matrix = Matrix(name="any", M=M, N=N, num_triplets=4, width=12, owner=0, engine="exact")
    engine = ENGINES["exact"]([matrix], home=StateHome(torch.device("cpu")), seed=0, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    W_MN = torch.randn(M, N, generator=generator)
    halves = torch.zeros(2, M, N, dtype=torch.float64)
    for index in range(6):
        x_TN = torch.randn(T, N, generator=generator)
        dy_TM = x_TN @ W_MN.T + 3 * torch.randn(T, M, generator=generator) * N**0.5
        engine.begin_microbatch(index)
        engine.observe("any", x_TN, dy_TM)
        halves[index % 2] += dy_TM.double().T @ x_TN.double()
    Phi_NS = torch.randn(N, ERROR_COLUMNS, generator=seeded_generator(0, "any/error", torch.device("cpu")))
    even, odd = halves @ Phi_NS.double()
    expected = ((even * odd).sum() / (even.norm() * odd.norm())).item()
    assert engine.split_half_cosines(world) == [pytest.approx(expected, abs=1e-5)]


@pytest.mark.parametrize("T", [8, 200])
@pytest.mark.parametrize("name", ENGINES)
def test_a_half_without_microbatches_has_no_cosine(name: str, T: int) -> None:
    """Over any number of refreshes, and with a state that was saved and loaded on the way."""
    M, N, world = 96, 80, World.alone()
    matrix = Matrix(name="any", M=M, N=N, num_triplets=4, width=12, owner=0, engine=name)
    fresh = partial(ENGINES[name], [matrix], home=StateHome(torch.device("cpu")), seed=0, dtype=torch.float32)
    engine, draw = fresh(), torch.Generator().manual_seed(0)
    for _ in range(4):
        engine.begin_microbatch(1)
        engine.observe("any", torch.randn(T, N, generator=draw), torch.randn(T, M, generator=draw))
        engine.end_microbatch(world)
        state, engine = engine.save_state(world), fresh()
        engine.load_state(state.content, state.tensors, world)
        assert engine.split_half_cosines(world) == [None]
    found = dict(engine.factorize(world, 1))["any"]
    assert found.split_half_cosine is None and found.subspace_cosine is None


@pytest.mark.skipif(not multiplies_bfloat16(), reason="the processor has no units for bfloat16")
def test_products_of_bfloat16_lose_no_more_than_the_data_has_lost() -> None:
    """Each product is rounded once; over many microbatches these errors average out, as the data's own do."""
    world, M, N, T = World.alone(), 96, 80, 64
    matrix = Matrix(name="any", M=M, N=N, num_triplets=4, width=8, owner=0, engine="exact")
    engine = ExactEngine([matrix], home=StateHome(torch.device("cpu")), seed=0, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    truth, rounded_data = torch.zeros(2, M, N, dtype=torch.float64)
    for index in range(32):
        x_TN = torch.randn(T, N, generator=generator)
        dy_TM = torch.randn(T, M, generator=generator) + x_TN[:, :1]
        engine.begin_microbatch(index)
        engine.observe("any", x_TN.bfloat16(), dy_TM.bfloat16())
        truth += dy_TM.double().T @ x_TN.double()
        rounded_data += dy_TM.bfloat16().double().T @ x_TN.bfloat16().double()
    engine.collect(world)
    ((_, G_MN),) = engine.mean_gradients(1)
    assert (G_MN - rounded_data).norm() < 1.5 * (rounded_data - truth).norm()
    assert (G_MN - rounded_data).norm() < 3e-3 * truth.norm()


@pytest.mark.parametrize("tokens", [32, 512], ids=["few rows at first", "many"])
@pytest.mark.parametrize("name", ENGINES)
def test_products_of_float16_may_be_out_of_its_range(name: str, tokens: int) -> None:
    M, N, world = 96, 80, World.alone()
    width = ENGINES[name].width(8, M, N, 16)
    matrix = Matrix(name="any", M=M, N=N, num_triplets=8, width=width, owner=0, engine=name)
    engine = ENGINES[name]([matrix], home=StateHome(torch.device("cpu")), seed=0, dtype=torch.float16)
    draw, G_MN = torch.Generator().manual_seed(0), torch.zeros(M, N, dtype=torch.float64)
    mean_N, mean_M = torch.randn(N, generator=draw), torch.randn(M, generator=draw)
    for index in range(4):
        x_TN = (8000 * (mean_N + 0.1 * torch.randn(tokens, N, generator=draw))).half()
        dy_TM = (mean_M + 0.1 * torch.randn(tokens, M, generator=draw)).half()
        engine.begin_microbatch(index)
        engine.observe("any", x_TN, dy_TM)
        engine.end_microbatch(world)
        G_MN += dy_TM.double().T @ x_TN.double()
    found = dict(engine.factorize(world, 1))["any"]
    assert found.svd.S_K[0].item() == pytest.approx(torch.linalg.matrix_norm(G_MN, 2).item(), rel=1e-4)
    assert found.captured_energy > 0.99


@pytest.mark.parametrize("scale", [1e-25, 1e18])
@pytest.mark.parametrize("name", ENGINES)
def test_what_is_found_does_not_depend_on_the_scale_of_gradients(name: str, scale: float) -> None:
    M, N, T, world = 96, 128, 64, World.alone()
    width = ENGINES[name].width(8, M, N, 8)
    matrix = Matrix(name="any", M=M, N=N, num_triplets=8, width=width, owner=0, engine=name)
    draw = torch.Generator().manual_seed(0)
    spectrum, left_8M, right_8N = (
        torch.logspace(0, -2, 8),
        torch.randn(8, M, generator=draw),
        torch.randn(8, N, generator=draw),
    )
    batches = []
    for _ in range(4):
        inside_T8, noise = torch.randn(T, 8, generator=draw) * spectrum, torch.randn(T, M + N, generator=draw)
        batches.append((inside_T8 @ right_8N + 0.01 * noise[:, M:], inside_T8 @ left_8M + 0.01 * noise[:, :M]))

    def found(scale: float) -> tuple[torch.Tensor, GradientFacts]:
        engine = ENGINES[name]([matrix], home=StateHome(torch.device("cpu")), seed=0, dtype=torch.float32)
        for index, (x_TN, dy_TM) in enumerate(batches):
            engine.begin_microbatch(index)
            engine.observe("any", x_TN, scale * dy_TM)
            engine.end_microbatch(world)
        of_target = dict(engine.factorize(world, 1))["any"]
        return of_target.svd.S_K.double() / scale, GradientFacts.of(matrix, of_target)

    (S_K, facts), (expected_K, usual) = found(scale), found(1.0)
    torch.testing.assert_close(S_K[:8], expected_K[:8], rtol=1e-3, atol=0)
    for num_triplets in (4, 8):
        expected = usual.leading(num_triplets).captured_energy
        assert facts.leading(num_triplets).captured_energy == pytest.approx(expected, abs=1e-5)


def large(engine: str, d: int) -> Matrix:
    return Matrix(
        name="any", M=d, N=d, num_triplets=16, width=ENGINES[engine].width(16, d, d, None), owner=0, engine=engine
    )


@pytest.mark.parametrize(
    ("d", "amount", "cheaper"),
    [
        (512, USUAL_AMOUNT, "exact"),
        (4096, USUAL_AMOUNT, "sketch"),
        (1024, Amount(num_tokens=16 * 128, num_microbatches=16), "exact"),
        (4096, Amount(num_tokens=32 * 512, num_microbatches=32), "sketch"),
        (2048, Amount(num_tokens=16 * 256, num_microbatches=16, dtype=torch.bfloat16), "sketch"),
        (512, Amount(num_tokens=16 * 256, num_microbatches=16, dtype=torch.bfloat16), "exact"),
    ],
)
def test_the_cheaper_engine_is_the_one_that_is_measured_to_be(d: int, amount: Amount, cheaper: str) -> None:
    costs = {engine: ENGINES[engine].cost(large(engine, d), amount) for engine in ("exact", "sketch")}
    assert min(costs, key=costs.__getitem__) == cheaper


@pytest.mark.parametrize("engine", ENGINES)
def test_more_data_costs_no_less(engine: str) -> None:
    matrix = large(engine, 1024)
    costs = [ENGINES[engine].cost(matrix, Amount(256 * count, count)) for count in (1, 2, 16, 256)]
    assert costs == sorted(set(costs))
