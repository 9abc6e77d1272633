"""Matrices that tokens are routed to: rare, late, on one rank alone, never; against float64 sums, on 1 and 2 ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from subspace import efficiency
from torch import Tensor

from loraga_dist.engines import ENGINES, GradientEngine, GradientSVD, Matrix, StateHome
from loraga_dist.engines.base import EngineState
from loraga_dist.engines.group import EngineGroup
from loraga_dist.ranks.world import World

M, N, K, R, EXPERTS, PARTS, MICROBATCHES = 160, 144, 32, 4, 16, 2, 16
TOKENS = 512
"""Of a part of a microbatch, over all experts."""
LATE, SAVED = 5, 4
FEW, ONE_SIDED, LATE_ONE, NEVER = 12, 13, 14, 15
"""Experts: a row of one part, in two microbatches; all rows in the second part; none at first; none at all."""
USUAL = range(FEW)
HOME = StateHome(torch.device("cpu"))


def name_of(expert: int) -> str:
    return f"experts.gate_up_proj.{expert}"


def matrices(kind: str, world_size: int) -> list[Matrix]:
    return [
        Matrix(
            name=name_of(expert), M=M, N=N, num_triplets=2 * R, width=K, owner=expert % world_size, engine=kind,
            is_routed=True,
        )
        for expert in range(EXPERTS)
    ]  # fmt: skip


def rows_of(index: int, part: int) -> dict[int, tuple[Tensor, Tensor]]:
    """(x_TN, dy_TM) of the experts that have any."""
    draw = torch.Generator().manual_seed(100 * index + part)
    chosen = torch.randint(0, EXPERTS, (TOKENS,), generator=draw)
    mixing_MN = torch.randn(EXPERTS, M, N, generator=torch.Generator().manual_seed(0)) / N**0.5
    found = {}
    for expert in range(EXPERTS):
        count = int((chosen == expert).sum())
        if expert == FEW:
            count = int(part == 0 and index in (2, 7))
        if expert == NEVER or expert == LATE_ONE and index < LATE or expert == ONE_SIDED and part == 0:
            count = 0
        x_TN = torch.randn(count, N, generator=draw) * torch.arange(1, N + 1) ** -1.0
        noise_TM = torch.randn(count, M, generator=draw) * torch.arange(1, M + 1) ** -1.0
        if count:
            found[expert] = x_TN, x_TN @ mixing_MN[expert].T + 0.3 * noise_TM
    return found


def gradients() -> Tensor:
    G_EMN = torch.zeros(EXPERTS, M, N, dtype=torch.float64)
    for index in range(MICROBATCHES):
        for part in range(PARTS):
            for expert, (x_TN, dy_TM) in rows_of(index, part).items():
                G_EMN[expert] += dy_TM.double().T @ x_TN.double()
    return G_EMN


def show(engine: GradientEngine, world: World, first: int, last: int, only: int | None = None) -> None:
    for index in range(first, last):
        engine.begin_microbatch(index)
        for part in range(world.rank, PARTS, world.size):
            for expert, (x_TN, dy_TM) in rows_of(index, part).items():
                if only in (None, expert):
                    engine.observe(name_of(expert), x_TN, dy_TM)
        engine.end_microbatch(world)


def engine_of(members: list[Matrix]) -> GradientEngine:
    return ENGINES[members[0].engine](members, home=HOME, seed=0, dtype=torch.float32)


def together(kind: str, refine: bool) -> dict[str, GradientSVD]:
    world = World.start()
    engine = engine_of(matrices(kind, world.size))
    show(engine, world, 0, MICROBATCHES)
    if refine:
        engine.begin_refinement(world)
        show(engine, world, 0, MICROBATCHES)
    return dict(engine.factorize(world, 1))


def alone(expert: int) -> GradientSVD:
    world = World.alone()
    engine = engine_of([matrices("sketch", 1)[expert]])
    show(engine, world, 0, MICROBATCHES, only=expert)
    return dict(engine.factorize(world, 1))[name_of(expert)]


def merged(of_ranks: list[dict[str, GradientSVD]]) -> list[GradientSVD]:
    by_name = {name: found for part in of_ranks for name, found in part.items()}
    return [by_name[name_of(expert)] for expert in range(EXPERTS)]


def well_used(G_MN: Tensor, found: GradientSVD) -> float:
    return efficiency(G_MN, found.svd.U_MK[:, R : 2 * R], found.svd.Vh_KN[:R].T)


@pytest.fixture(scope="module")
def truth() -> Tensor:
    return gradients()


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ENGINES)
def test_every_expert_gets_its_own(kind: str, world_size: int, refine: bool, truth: Tensor) -> None:
    if kind == "exact" and refine:
        pytest.skip("it does not refine")
    found = merged(run_on_ranks(together, world_size, kind, refine))
    least = 0.9999 if refine or kind == "exact" else 0.999
    for expert in (*USUAL, ONE_SIDED, LATE_ONE):
        assert well_used(truth[expert], found[expert]) >= least, expert
    for expert, each in enumerate(found):
        U_MK, V_NK = each.svd.U_MK, each.svd.Vh_KN.T
        for basis in (U_MK, V_NK):
            torch.testing.assert_close(basis.T @ basis, torch.eye(K), rtol=0, atol=1e-4)
        wanted, energy = each.svd.leading(2 * R), truth[expert].square().sum()
        lost = (truth[expert] - wanted.U_MK * wanted.S_K @ wanted.Vh_KN).square().sum()
        captured = float(1 - lost / energy) if energy else 0.0
        # an estimate by 16 columns, which are few beside two directions
        assert each.captured_energy == pytest.approx(captured, abs=0.2 if expert == FEW else 0.05), expert
    few = found[FEW].svd
    assert (1e-6 * few.S_K[0] < few.S_K).tolist() == [True] * 2 + [False] * (K - 2), "two rows have a rank of two"
    if refine or kind == "exact":  # the second row is not in what the first has left of bases
        assert (few.U_MK * few.S_K @ few.Vh_KN - truth[FEW]).norm() < 1e-4 * truth[FEW].norm()
    assert found[NEVER].svd.S_K.tolist() == [0.0] * K
    assert found[NEVER].split_half_cosine is None and found[NEVER].captured_energy == 0.0


def test_many_together_are_as_good_as_each_alone(truth: Tensor) -> None:
    for expert, each in enumerate(merged(run_on_ranks(together, 1, "sketch", False))):
        single = alone(expert)
        torch.testing.assert_close(each.svd.S_K, single.svd.S_K, rtol=1e-3, atol=1e-4 * float(single.svd.S_K[0]))
        assert each.window_capture == (single.window_capture and pytest.approx(single.window_capture, abs=1e-3))
        if expert not in (FEW, NEVER):
            assert well_used(truth[expert], each) == pytest.approx(well_used(truth[expert], single), abs=1e-4)


@pytest.mark.parametrize("swapped", [False, True], ids=["x, dy", "dy, x"])
@pytest.mark.parametrize("kind", ENGINES)
def test_rounding_gives_no_more_directions_than_rows_with_a_gradient(kind: str, swapped: bool) -> None:
    """Most rows have none, as padding and prompts do; Llama4's experts have it on the other side."""
    shown_MN = (N, M) if swapped else (M, N)
    members = [
        replace(matrices(kind, 1)[0], M=shown_MN[0], N=shown_MN[1], is_routed=is_routed) for is_routed in (True, False)
    ]
    ranks = []
    for member in members:
        engine, world = ENGINES[kind]([member], home=HOME, seed=0, dtype=torch.bfloat16), World.alone()
        draw = torch.Generator().manual_seed(0)
        for index in range(2 if kind == "exact" else 4):
            engine.begin_microbatch(index % 2)
            x_TN, dy_TM = (torch.randn(40, width, generator=draw).bfloat16() for width in (N, M))
            dy_TM[3:] = 0
            engine.observe(member.name, *((dy_TM, x_TN) if swapped else (x_TN, dy_TM)))
            engine.end_microbatch(world)
            if index == 1 and kind == "sketch":  # the same rows once more, which count once
                engine.begin_refinement(world)
                draw.manual_seed(0)
        S_K = dict(engine.factorize(world, 1))[member.name].svd.S_K
        ranks.append(int((S_K > 0).sum()))
    assert ranks[0] == 6 < ranks[1], "else rounding is taken for directions"


@dataclass(frozen=True)
class Saved:
    """Of one engine, as a checkpoint joins it over ranks."""

    content: dict[str, Any]
    tensors: dict[str, Tensor]


def begin_and_save(kind: str) -> EngineState:
    world = World.start()
    engine = engine_of(matrices(kind, world.size))
    show(engine, world, 0, SAVED)
    state = engine.save_state(world)
    return EngineState(state.content, {name: tensor.clone() for name, tensor in state.tensors.items()})


def go_on(kind: str, saved: Saved) -> dict[str, GradientSVD]:
    world = World.start()
    engine = engine_of(matrices(kind, world.size))
    engine.load_state(saved.content, saved.tensors, world)
    show(engine, world, SAVED, MICROBATCHES)
    return dict(engine.factorize(world, 1))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("kind", ENGINES)
def test_a_state_with_matrices_that_were_not_seen_goes_on(kind: str, before: int, after: int, truth: Tensor) -> None:
    states = run_on_ranks(begin_and_save, before, kind)
    saved = Saved(states[0].content, {name: tensor for state in states for name, tensor in state.tensors.items()})
    assert all(state.content == saved.content for state in states)
    for matrix in matrices(kind, 1):
        own = {
            name.removeprefix(f"{matrix.name}/"): (tensor.dtype, tuple(tensor.shape))
            for name, tensor in saved.tensors.items()
            if name.startswith(f"{matrix.name}/")
        }
        ENGINES[kind].check_state(matrix, saved.content, own)
        if kind == "exact":
            with pytest.raises(ValueError, match="rows"):
                ENGINES[kind].check_state(matrix, saved.content, {name: own[name] for name in ("G", "E")})
            continue
        counts = saved.content["counts"]
        for wrong in (-1, 1.5, None):
            content = {"counts": counts | {matrix.name: [*counts[matrix.name][:-1], wrong]}}
            with pytest.raises((ValueError, TypeError)):
                ENGINES[kind].check_state(matrix, content, own)
    if kind == "sketch":
        assert [saved.content["counts"][name_of(expert)][0] for expert in (0, LATE_ONE, NEVER)] == [True, False, False]
    resumed = merged(run_on_ranks(go_on, after, kind, saved))
    straight = merged(run_on_ranks(together, after, kind, False))
    for expert, (one, other) in enumerate(zip(resumed, straight, strict=True)):
        torch.testing.assert_close(one.svd.S_K, other.svd.S_K, rtol=1e-3, atol=1e-4 * float(other.svd.S_K[0]))
        assert one.split_half_cosine == pytest.approx(other.split_half_cosine, abs=1e-4)
        if expert not in (FEW, NEVER):
            assert well_used(truth[expert], one) >= 0.999


DENSE = ("before", "after")
"""Neighbours that are given one input; experts that have none of their own stand between them in a backward."""


def input_ranks() -> dict[str, float | None]:
    """Of the moments that regressions were made from, by matrix."""
    world = World.start()
    make = partial(Matrix, M=M, N=N, num_triplets=2 * R, width=K, engine="exact", moment_shape=(N, N))
    routed = [replace(each, moment_shape=(N, N)) for each in matrices("exact", world.size)]
    members = [make(name=DENSE[0], owner=0), *routed, make(name=DENSE[1], owner=world.size - 1)]
    group = EngineGroup.of(members, home=HOME, seed=0, dtype=torch.float32)
    for index in range(MICROBATCHES):
        group.begin_microbatch(index)
        # as many tokens as the first expert has rows: half of them count for what sees tokens in order
        for part in range(world.rank, PARTS, world.size):
            rows = rows_of(index, part)
            x_TN, dy_TM = rows[0]
            group.inputs.begin_microbatch({len(x_TN): torch.arange(0, len(x_TN), 2)}, is_copy=False)
            group.observe(DENSE[0], x_TN, dy_TM)
            for expert, (x_SN, dy_SM) in rows.items():
                # padding is routed, but nothing depends on it
                padded = torch.cat([x_SN, 9 * torch.ones(3, N)]), torch.cat([dy_SM, torch.zeros(3, M)])
                group.observe(name_of(expert), *(padded if expert else (x_SN, dy_SM)))
            group.observe(DENSE[1], x_TN, dy_TM)
        group.end_microbatch(world)
    group.collect(world)
    return {name: found.input_rank for name, found in group.results(1, damping=1e-3)}


@pytest.mark.parametrize("world_size", [1, 2])
def test_moments_are_of_an_experts_own_rows(world_size: int) -> None:
    found = {name: rank for part in run_on_ranks(input_ranks, world_size) for name, rank in part.items()}
    C_ENN, dense_NN = torch.zeros(EXPERTS, N, N, dtype=torch.float64), torch.zeros(N, N, dtype=torch.float64)
    for index in range(MICROBATCHES):
        for part in range(PARTS):
            for expert, (x_TN, _) in rows_of(index, part).items():
                C_ENN[expert] += x_TN.double().T @ x_TN.double()
                if not expert:
                    dense_NN += x_TN[::2].double().T @ x_TN[::2].double()
    for name, C_NN in zip(map(name_of, range(EXPERTS)), C_ENN, strict=True):
        expected = float(C_NN.trace().square() / C_NN.square().sum()) if C_NN.any() else None
        assert found[name] == (expected and pytest.approx(expected, rel=1e-4)), name
    dense = float(dense_NN.trace().square() / dense_NN.square().sum())
    assert [found[name] for name in DENSE] == pytest.approx([dense, dense], rel=1e-4)
