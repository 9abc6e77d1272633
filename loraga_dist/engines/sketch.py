"""The sketch engine: the truncated SVD of every mean gradient while the data streams by once; no M x N is ever formed.

Per target and token, with bases P_MK and Q_NK: Y_MK += dy (Q^T x)^T and Z_NK += x (P^T dy)^T, so that Y = G Q and
Z = G^T P over a window of global microbatches. At the end of a window the ranks' sketches are summed on the target's
owner, united with what earlier windows found (`linalg.boolean_sum`), and only the new bases travel back. Each refresh
multiplies the estimate by new data, a step of subspace iteration that costs no pass of its own; windows double.

The first microbatch has no bases yet. Each rank keeps its own gradient of it in factored form, (x, dy) compressed to
a low-rank product, so that the ranks can iterate on it together and then project it like any other data: nothing runs
twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraga_dist.engines.base import (
    ERROR_COLUMNS,
    Collectives,
    GradientSVD,
    Matrix,
    seeded_generator,
    split_half_cosine,
)
from loraga_dist.linalg import TruncatedSVD, boolean_sum, complete_basis, orthonormal_columns

COLD_ITERATIONS = 2
"""Rounds of subspace iteration on the first microbatch's gradient: in the tap on one rank's part, then over ranks."""


def width(num_triplets: int, M: int, N: int, oversampling: int | None) -> int:
    """K, at most min(M, N): by default the wanted triplets and as many again, 96 at least and 128 at most.

    Measured by benchmarks/accuracy.py. Rounded up to a multiple of 16, which matrix units like.
    """
    if oversampling is None:
        oversampling = min(max(num_triplets, 96), 128)
    return min(-(-(num_triplets + oversampling) // 16) * 16, M, N)


def state_bytes(M: int, N: int, width: int) -> int:
    """Float32 bytes one matrix takes on every rank: bases, accumulators and error sketches."""
    return 4 * (2 * width * (M + N) + 2 * M * ERROR_COLUMNS + N * ERROR_COLUMNS)


@dataclass
class _Window:
    """Bases, and the sketches Y = G Q, Z = G^T P of the data since they were made."""

    P_MK: Tensor
    Q_NK: Tensor
    Y_MK: Tensor
    Z_NK: Tensor

    def observe(self, x_TN: Tensor, dy_TM: Tensor) -> None:
        _add_product(self.Y_MK, dy_TM, x_TN @ self.Q_NK.to(x_TN.dtype))
        _add_product(self.Z_NK, x_TN, dy_TM @ self.P_MK.to(dy_TM.dtype))


@dataclass
class _State:
    """One target's sketch on this rank."""

    matrix: Matrix
    Phi_NS: Tensor
    E_2MS: Tensor
    """Error sketches G Phi of even and odd microbatches, since the last refresh."""
    cold: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(L_MK, V_NK) with L V^T this rank's gradient before there were bases."""
    window: _Window | None = None
    """None until the target has seen a token."""
    num_microbatches: int = 0
    refreshed_at: int = 0
    refining: bool = False
    svd: TruncatedSVD | None = None
    """On the owner: the estimate from all windows so far, summed over tokens."""
    total_E_2MS: Tensor | None = None
    """On the owner: error sketches of all windows so far."""
    captures: list[float] = field(default_factory=list)
    """On the owner: share of each window's energy that its own sketch held."""


class SketchEngine:
    """Sketches every gradient in one pass; see the module's docstring and `GradientEngine`."""

    def __init__(self, matrices: Sequence[Matrix], *, device: torch.device, seed: int) -> None:
        self._seed = seed
        self._device = device
        self._half = 0
        self._halves_seen: set[int] = set()
        self._states: dict[str, _State] = {}
        for matrix in matrices:
            generator = self._generator(f"{matrix.name}/error")
            self._states[matrix.name] = _State(
                matrix=matrix,
                Phi_NS=torch.randn(matrix.N, ERROR_COLUMNS, generator=generator).to(device),
                E_2MS=torch.zeros(2, matrix.M, ERROR_COLUMNS, device=device),
            )

    @property
    def names(self) -> list[str]:
        return list(self._states)

    def begin_microbatch(self, index: int) -> None:
        self._half = index % 2
        self._halves_seen.add(self._half)

    def observe(self, name: str, x_TN: Tensor, dy_TM: Tensor) -> None:
        state = self._states[name]
        if state.window is None:
            width = 2 * state.matrix.width
            state.cold.append(_compress(x_TN.float(), dy_TM.float(), width, self._generator(f"{name}/cold")))
        else:
            state.window.observe(x_TN, dy_TM)
        if not state.refining:
            _add_product(state.E_2MS[self._half], dy_TM, x_TN @ state.Phi_NS.to(x_TN.dtype))

    def end_microbatch(self, world: Collectives) -> None:
        """A collective: starts targets that have seen their first token, refreshes those whose window is full."""
        self._start_cold(world)
        due = []
        for state in self._states.values():
            if state.window is None:
                continue
            state.num_microbatches += 1
            power_of_two = state.num_microbatches & (state.num_microbatches - 1) == 0
            if power_of_two and state.num_microbatches > 1 and not state.refining:
                due.append(state)
        self._refresh(due, world)

    def split_half_cosines(self, world: Collectives) -> list[float | None]:
        unfinished = {state.matrix.name for state in self._unfinished()}
        cosines = []
        for name, state in self._states.items():
            E_2MS = torch.zeros_like(state.E_2MS) if state.total_E_2MS is None else state.total_E_2MS
            if name in unfinished:  # what was seen since the last refresh is on all ranks, and stays there
                since_E_2MS = state.E_2MS.clone()
                world.reduce_(since_E_2MS, state.matrix.owner)
                E_2MS = E_2MS + since_E_2MS
            if state.matrix.owner == world.rank:
                cosines.append(split_half_cosine(E_2MS, len(self._halves_seen)))
        return cosines

    def begin_refinement(self, world: Collectives) -> None:
        """Between two passes over the same data: the estimate becomes the bases, and all data is seen again with them.

        A collective. The union of both projections onto good bases is exact to second order in their error.
        """
        self._refresh(self._unfinished(), world)
        for state in self._states.values():
            state.svd = None
            state.refining = True

    def factorize(self, world: Collectives, num_tokens: int) -> Iterator[tuple[str, GradientSVD]]:
        self._refresh(self._unfinished(), world, last=True)
        for name, state in self._states.items():
            if state.matrix.owner == world.rank:
                yield name, self._result(state, num_tokens)
        self._states.clear()

    def _unfinished(self) -> list[_State]:
        return [state for state in self._states.values() if state.num_microbatches > state.refreshed_at]

    def _start_cold(self, world: Collectives) -> None:
        cold = [state for state in self._states.values() if state.window is None]
        if not cold:
            return
        seen = [float(any(bool(L_MK.any()) for L_MK, _ in state.cold)) for state in cold]
        seen = world.sum_(torch.tensor(seen, device=self._device)).tolist()
        for state in (state for state, ranks in zip(cold, seen, strict=True) if ranks):
            state.window = self._first_window(state, world)
            state.cold = []

    def _first_window(self, state: _State, world: Collectives) -> _Window:
        """Bases from the first microbatch by subspace iteration over ranks; then its sketch, as of any other data."""
        matrix, generator = state.matrix, self._generator(f"{state.matrix.name}/start")

        def times_G(Q_NK: Tensor) -> Tensor:
            return sum((L @ (V.T @ Q_NK) for L, V in state.cold), Q_NK.new_zeros(matrix.M, matrix.width))

        def times_Gt(P_MK: Tensor) -> Tensor:
            return sum((V @ (L.T @ P_MK) for L, V in state.cold), P_MK.new_zeros(matrix.N, matrix.width))

        def shared_basis(X_MK: Tensor) -> Tensor:
            world.reduce_(X_MK, matrix.owner)
            if world.rank == matrix.owner:
                X_MK = complete_basis(orthonormal_columns(X_MK)[0], matrix.width, generator)
            return world.broadcast_(X_MK, matrix.owner)

        Q_NK = torch.randn(matrix.N, matrix.width, generator=generator).to(self._device)
        for _ in range(COLD_ITERATIONS):
            P_MK = shared_basis(times_G(Q_NK))
            Q_NK = shared_basis(times_Gt(P_MK))
        return _Window(P_MK=P_MK, Q_NK=Q_NK, Y_MK=times_G(Q_NK), Z_NK=times_Gt(P_MK))

    def _refresh(self, states: Sequence[_State], world: Collectives, *, last: bool = False) -> None:
        windows = [(state, state.window) for state in states if state.window is not None]
        # three rounds over the targets, so that owners unite theirs at the same time
        for state, window in windows:
            for tensor in (window.Y_MK, window.Z_NK, state.E_2MS):
                world.reduce_(tensor, state.matrix.owner)
        for state, window in windows:
            if state.matrix.owner == world.rank:
                self._unite(state, window)
        for state, window in windows:
            if not last:
                world.broadcast_(window.P_MK, state.matrix.owner)
                world.broadcast_(window.Q_NK, state.matrix.owner)
            for tensor in (window.Y_MK, window.Z_NK, state.E_2MS):
                tensor.zero_()
            state.refreshed_at = state.num_microbatches

    def _unite(self, state: _State, window: _Window) -> None:
        """On the owner: this window's sketches and the estimate of the earlier ones become the new estimate."""
        width = state.matrix.width
        P_MK, Q_NK, Y_MK, Z_NK = window.P_MK, window.Q_NK, window.Y_MK, window.Z_NK
        if not state.refining:
            alone = boolean_sum(Y_MK, Z_NK, P_MK, Q_NK, width)
            state.captures.append(_captured(alone, state.E_2MS.sum(dim=0), state.Phi_NS))
        if state.svd is not None:
            # the carried estimate joins after the reduce, or it would count once per rank
            US_MK, SVh_KN = state.svd.U_MK * state.svd.S_K, state.svd.S_K[:, None] * state.svd.Vh_KN
            Y_MK = Y_MK + US_MK @ (state.svd.Vh_KN @ Q_NK)
            Z_NK = Z_NK + SVh_KN.T @ (state.svd.U_MK.T @ P_MK)
        state.svd = boolean_sum(Y_MK, Z_NK, P_MK, Q_NK, width)
        state.total_E_2MS = state.E_2MS + (0 if state.total_E_2MS is None else state.total_E_2MS)
        generator = self._generator(f"{state.matrix.name}/refresh{state.num_microbatches}")
        window.P_MK.copy_(complete_basis(state.svd.U_MK, width, generator))
        window.Q_NK.copy_(complete_basis(state.svd.Vh_KN.T, width, generator))

    def _result(self, state: _State, num_tokens: int) -> GradientSVD:
        matrix = state.matrix
        if state.svd is None or state.total_E_2MS is None:  # no token reached this target
            empty = [torch.zeros(n, 0, device=self._device) for n in (matrix.M, matrix.N)]
            svd = TruncatedSVD(U_MK=empty[0], S_K=torch.zeros(0, device=self._device), Vh_KN=empty[1].T)
            E_2MS = state.E_2MS
        else:
            svd, E_2MS = state.svd, state.total_E_2MS
        svd = _padded(svd, matrix.width, self._generator(f"{matrix.name}/padding"))
        svd = TruncatedSVD(U_MK=svd.U_MK, S_K=svd.S_K / num_tokens, Vh_KN=svd.Vh_KN)
        return GradientSVD(
            svd=svd,
            captured_energy=_captured(svd.leading(matrix.num_triplets), E_2MS.sum(dim=0) / num_tokens, state.Phi_NS),
            split_half_cosine=split_half_cosine(E_2MS, len(self._halves_seen)),
            window_capture=_worst_against_best_before(state.captures),
        )

    def _generator(self, name: str) -> torch.Generator:
        # on the CPU, so that ranks draw the same numbers whatever their devices are
        return seeded_generator(self._seed, name, torch.device("cpu"))


def _add_product(accumulator_MK: Tensor, left_TM: Tensor, right_TK: Tensor) -> None:
    """accumulator += left^T right, the accumulator in float32 whatever the inputs are."""
    if left_TM.dtype == torch.float32:
        accumulator_MK.addmm_(left_TM.t(), right_TK)
    else:
        accumulator_MK.add_(left_TM.t() @ right_TK)


def _compress(x_TN: Tensor, dy_TM: Tensor, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(L_MK, V_NK) with L V^T the best part of dy^T x within `width` columns, by subspace iteration on the factors."""
    width = min(width, *x_TN.shape, *dy_TM.shape)
    V_NK = torch.randn(x_TN.shape[1], width, generator=generator).to(x_TN.device)
    for _ in range(COLD_ITERATIONS):
        U_MK, _ = orthonormal_columns(dy_TM.t() @ (x_TN @ V_NK))
        V_NK, _ = orthonormal_columns(x_TN.t() @ (dy_TM @ U_MK))
    return dy_TM.t() @ (x_TN @ V_NK), V_NK


def _captured(svd: TruncatedSVD, E_MS: Tensor, Phi_NS: Tensor) -> float:
    """1 - ||(G - U S V^T) Phi||^2 / ||G Phi||^2, an estimate of the energy share the triplets hold."""
    rest = E_MS - svd.U_MK @ (svd.S_K[:, None] * (svd.Vh_KN @ Phi_NS))
    whole = torch.linalg.vector_norm(E_MS, dtype=torch.float64).square()
    return 1 - (torch.linalg.vector_norm(rest, dtype=torch.float64).square() / whole).item() if whole else 0.0


def _worst_against_best_before(captures: Sequence[float]) -> float | None:
    ratios = [capture / max(captures[:i]) for i, capture in enumerate(captures) if i and max(captures[:i]) > 0]
    return min(ratios, default=None)


def _padded(svd: TruncatedSVD, width: int, generator: torch.Generator) -> TruncatedSVD:
    """`width` triplets: the missing ones have singular value 0 and arbitrary orthonormal vectors."""
    missing = width - svd.width
    return TruncatedSVD(
        U_MK=complete_basis(svd.U_MK, width, generator),
        S_K=torch.cat([svd.S_K, svd.S_K.new_zeros(missing)]),
        Vh_KN=complete_basis(svd.Vh_KN.T, width, generator).T.contiguous(),
    )
