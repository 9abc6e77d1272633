"""The sketch engine: the truncated SVD of every mean gradient while the data streams by once; no M x N is ever formed.

Per target and token, with bases P_MK and Q_NK: Y_MK += dy (Q^T x)^T and Z_NK += x (P^T dy)^T, so that Y = G Q and
Z = G^T P over a window of global microbatches. At the end of a window the ranks' sketches are summed on the target's
owner, united with what earlier windows found (`linalg.boolean_sum`), and only the new bases travel back. Each refresh
multiplies the estimate by new data, a step of subspace iteration that costs no pass of its own; windows double.

The first microbatch has no bases yet. Each rank keeps its x and dy of it, or a low-rank product that stands for them if
they have many rows, until the ranks have found bases together; then it is sketched like any other data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from loraga_dist.engines.base import (
    ERROR_COLUMNS,
    Collectives,
    EngineState,
    Entries,
    GradientSVD,
    Matrix,
    Tensors,
    gather_on_owner_,
    naming,
    require_entries,
    require_halves,
    seeded_generator,
    split_half_cosine,
)
from loraga_dist.engines.home import StateHome
from loraga_dist.engines.sketch_state import SketchCosts, State, Window, kept_rows
from loraga_dist.linalg import TruncatedSVD, boolean_sum, complete_basis, orthonormal_columns

COLD_ITERATIONS = 2
"""Rounds of subspace iteration on the first microbatch's gradient."""


class SketchEngine(SketchCosts):
    """Sketches every gradient in one pass; see the module's docstring."""

    refines: ClassVar[bool] = True

    def __init__(self, matrices: Sequence[Matrix], *, home: StateHome, seed: int, dtype: torch.dtype) -> None:
        """dtype: of x and dy; data of another dtype is right, too, but the bases are cast for it every time."""
        super().__init__(matrices, home=home, seed=seed, dtype=dtype)
        self._device = home.device
        self._states = {
            matrix.name: State(
                matrix=matrix, E_2MS=home.keep(torch.zeros(2, matrix.M, ERROR_COLUMNS, device=home.device))
            )
            for matrix in matrices
        }

    def observe(self, name: str, x_TN: Tensor, dy_TM: Tensor) -> None:
        state = self._states[name]
        if state.window is None:
            x_TN, dy_TM = self._few_rows(state.matrix, x_TN, dy_TM)
            state.cold.append((self._home.keep(x_TN), self._home.keep(dy_TM)))
        else:
            self._sketch(state, state.window, x_TN, dy_TM)

    def _sketch(self, state: State, window: Window, x_TN: Tensor, dy_TM: Tensor) -> None:
        K = state.matrix.width
        right_NC = self._home.fetch(window.QPhi_NC).to(x_TN.dtype)
        if state.refining:  # the first pass has the error sketch
            right_NC = right_NC[:, :K]
        product_MC = dy_TM.t() @ (x_TN @ right_NC)
        self._add(window.Y_MK, product_MC[:, :K])
        if not state.refining:
            self._add(state.E_2MS[self._half], product_MC[:, K:])
        self._add(window.Z_NK, x_TN.t() @ (dy_TM @ self._home.fetch(window.P_MK).to(dy_TM.dtype)))

    def _add(self, kept: Tensor, increment: Tensor) -> None:
        accumulator = self._home.fetch(kept)
        self._home.put_back(kept, accumulator.add_(increment))

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
        unfinished, fetch = {state.matrix.name for state in self._unfinished()}, self._home.fetch
        cosines = []
        for name, state in self._states.items():
            E_2MS = fetch(state.E_2MS)
            if name in unfinished:  # what was seen since the last refresh is on all ranks, and stays there
                E_2MS = E_2MS.clone()
                world.reduce_(E_2MS, state.matrix.owner)
            if state.matrix.owner == world.rank:
                cosines.append(split_half_cosine(E_2MS, len(self._halves_seen)))
        return cosines

    def begin_refinement(self, world: Collectives) -> None:
        """Between two passes over the same data: the estimate becomes the bases, and all data is seen again with them.

        A collective. The union of both projections onto good bases is exact to second order in their error.
        """
        self._refresh(self._unfinished(), world)
        for state in self._states.values():
            state.S_J = None
            state.refining = True

    def save_state(self, world: Collectives) -> EngineState:
        tensors = {}
        for name, state in self._states.items():
            kept = {"E": state.E_2MS}
            if state.window is not None:
                kept |= {"Y": state.window.Y_MK, "Z": state.window.Z_NK}
            for tensor in kept.values():
                sums = self._home.fetch(tensor)
                gather_on_owner_(sums, state.matrix.owner, world)
                self._home.put_back(tensor, sums)
            if state.matrix.owner == world.rank:
                kept |= {"captures": torch.tensor(state.captures, dtype=torch.float64)}
                kept |= {"S": state.S_J, "earlier_E": state.earlier_E_MS}
                if state.window is not None:
                    kept["P"], kept["Q"] = self._bases(state, state.window)
                tensors |= {
                    f"{name}/{part}": self._home.fetch(tensor).cpu()
                    for part, tensor in kept.items()
                    if tensor is not None
                }
        counts = {
            name: [state.window is not None, state.num_microbatches, state.refreshed_at, state.refining]
            for name, state in self._states.items()
        }
        return EngineState({"halves_seen": sorted(self._halves_seen), "counts": counts}, tensors)

    def load_state(self, content: dict[str, Any], tensors: Tensors, world: Collectives) -> None:
        self._halves_seen = set(content["halves_seen"])
        for name, state in self._states.items():
            started, state.num_microbatches, state.refreshed_at, state.refining = content["counts"][name]
            is_owner = state.matrix.owner == world.rank
            if started:
                P_MK, Q_NK = (tensors[f"{name}/{part}"].to(self._device) for part in "PQ")
                state.window = self._window(state.matrix, P_MK, Q_NK)
                if is_owner:
                    self._keep_rest(state, state.window, P_MK, Q_NK)
                    self._home.put_back(state.window.Y_MK, tensors[f"{name}/Y"].to(self._device))
                    self._home.put_back(state.window.Z_NK, tensors[f"{name}/Z"].to(self._device))
            if is_owner:
                self._home.put_back(state.E_2MS, tensors[f"{name}/E"].to(self._device))
                state.captures = tensors[f"{name}/captures"].tolist()
                if f"{name}/S" in tensors:
                    state.S_J = tensors[f"{name}/S"].to(self._device)
                if f"{name}/earlier_E" in tensors:
                    state.earlier_E_MS = self._home.keep(tensors[f"{name}/earlier_E"].to(self._device))

    @classmethod
    def check_state(cls, matrix: Matrix, content: dict[str, Any], saved: Entries) -> None:
        require_halves(content["halves_seen"])
        counts = content["counts"][matrix.name]
        started, num_microbatches, refreshed_at, refining = counts
        if [type(count) for count in counts] != [bool, int, int, bool] or not 0 <= refreshed_at <= num_microbatches:
            raise ValueError(f"{matrix.name} has the counts {counts}")
        M, N, K, float32 = matrix.M, matrix.N, matrix.width, torch.float32
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"E": (float32, (2, M, ERROR_COLUMNS))}
        if started:
            expected |= {name: (float32, (rows, K)) for name, rows in (("Y", M), ("Z", N), ("P", M), ("Q", N))}
        if "earlier_E" in saved:
            expected["earlier_E"] = float32, (M, ERROR_COLUMNS)
        # of as many windows and directions as there were
        (windows,), (J,) = saved["captures"][1], saved["S"][1] if "S" in saved else (0,)
        expected["captures"] = torch.float64, (windows,)
        if "S" in saved:
            expected["S"] = float32, (min(J, K),)
        require_entries(saved, expected)

    def collect(self, world: Collectives) -> None:
        self._reduce(self._unfinished(), world)
        self._states = {name: state for name, state in self._states.items() if state.matrix.owner == world.rank}

    def results(self, num_tokens: int) -> Iterator[tuple[str, GradientSVD]]:
        for name in list(self._states):
            state = self._states.pop(name)
            with naming(state.matrix):
                if state.window is not None and state.num_microbatches > state.refreshed_at:
                    self._unite(state, state.window)
                result = self._result(state, num_tokens)
            yield name, result

    def _unfinished(self) -> list[State]:
        return [state for state in self._states.values() if state.num_microbatches > state.refreshed_at]

    def _start_cold(self, world: Collectives) -> None:
        cold = [state for state in self._states.values() if state.window is None]
        if not cold:
            return
        seen = world.sum_(torch.stack([self._largest_gradient(state) for state in cold])).tolist()
        for state, any_rank in zip(cold, seen, strict=True):
            if any_rank:
                state.window = self._first_window(state, world)
            state.cold.clear()

    def _largest_gradient(self, state: State) -> Tensor:
        """Largest magnitude in the cold rows' dy; 0 without rows."""
        # rows whose product is zero may have been compressed to none
        magnitudes = [self._home.fetch(dy_TM).abs().amax().float() for _, dy_TM in state.cold if dy_TM.numel()]
        return torch.stack([*magnitudes, torch.zeros((), device=self._device)]).amax()

    def _first_window(self, state: State, world: Collectives) -> Window:
        """Bases from the first microbatch by subspace iteration over ranks; then its sketch, as of any other data."""
        matrix, generator = state.matrix, self._generator(f"{state.matrix.name}/start")
        rows = [(self._home.fetch(x_TN), self._home.fetch(dy_TM)) for x_TN, dy_TM in state.cold]

        def shared_basis(X_MK: Tensor) -> Tensor:
            world.reduce_(X_MK, matrix.owner)
            if world.rank == matrix.owner:
                X_MK = complete_basis(orthonormal_columns(X_MK)[0], matrix.width, generator)
            return world.broadcast_(X_MK, matrix.owner)

        P_MK = torch.zeros(matrix.M, matrix.width, device=self._device)
        Q_NK = torch.randn(matrix.N, matrix.width, generator=generator).to(self._device)
        for _ in range(COLD_ITERATIONS):
            P_MK = shared_basis(sum((_product(dy, x, Q_NK) for x, dy in rows), torch.zeros_like(P_MK)))
            Q_NK = shared_basis(sum((_product(x, dy, P_MK) for x, dy in rows), torch.zeros_like(Q_NK)))
        window = self._window(matrix, P_MK, Q_NK)
        for x_TN, dy_TM in rows:
            self._sketch(state, window, x_TN, dy_TM)
        if world.rank == matrix.owner:
            self._keep_rest(state, window, P_MK, Q_NK)
        return window

    def _window(self, matrix: Matrix, P_MK: Tensor, Q_NK: Tensor) -> Window:
        """An empty window with these bases."""
        Phi_NS = torch.randn(matrix.N, ERROR_COLUMNS, generator=self._generator(f"{matrix.name}/error"))
        return Window(
            P_MK=self._home.keep(P_MK.to(self._dtype)),
            QPhi_NC=self._home.keep(torch.cat([Q_NK, Phi_NS.to(self._device)], dim=1).to(self._dtype)),
            Y_MK=self._home.keep(torch.zeros_like(P_MK)),
            Z_NK=self._home.keep(torch.zeros_like(Q_NK)),
        )

    def _keep_rest(self, state: State, window: Window, P_MK: Tensor, Q_NK: Tensor) -> None:
        """On the owner: what the window's 16 bits leave of float32 bases, in 16 bits again."""
        in_P_MK, in_Q_NK = self._in_window(state, window)
        if in_P_MK.dtype != P_MK.dtype:
            state.P_rest_MK = self._home.keep((P_MK - in_P_MK).to(in_P_MK.dtype))
            state.Q_rest_NK = self._home.keep((Q_NK - in_Q_NK).to(in_Q_NK.dtype))

    def _bases(self, state: State, window: Window) -> tuple[Tensor, Tensor]:
        """On the owner: P and Q in float32, of 32 bits or, within some 2^-18 of a column's norm, of twice 16."""
        P_MK, Q_NK = (basis.float() for basis in self._in_window(state, window))
        if state.P_rest_MK is not None and state.Q_rest_NK is not None:
            P_MK += self._home.fetch(state.P_rest_MK)
            Q_NK += self._home.fetch(state.Q_rest_NK)
        return P_MK, Q_NK

    def _in_window(self, state: State, window: Window) -> tuple[Tensor, Tensor]:
        return self._home.fetch(window.P_MK), self._home.fetch(window.QPhi_NC)[:, : state.matrix.width]

    def _reduce(self, states: Sequence[State], world: Collectives) -> list[tuple[State, Window]]:
        """Sum the windows on the owners."""
        windows = [(state, state.window) for state in states if state.window is not None]
        for state, window in windows:
            for kept in (window.Y_MK, window.Z_NK, state.E_2MS):
                sum_of_ranks = self._home.fetch(kept)
                world.reduce_(sum_of_ranks, state.matrix.owner)
                self._home.put_back(kept, sum_of_ranks)
        return windows

    def _refresh(self, states: Sequence[State], world: Collectives) -> None:
        # three rounds over the targets, so that owners unite theirs at the same time
        windows = self._reduce(states, world)
        for state, window in windows:
            if state.matrix.owner == world.rank:
                with naming(state.matrix):
                    self._unite(state, window)
        for state, window in windows:
            for kept in (window.P_MK, window.QPhi_NC):
                self._home.put_back(kept, world.broadcast_(self._home.fetch(kept), state.matrix.owner))
            emptied = [window.Y_MK, window.Z_NK]
            if state.matrix.owner != world.rank:  # the owner has it all now
                emptied.append(state.E_2MS)
            for kept in emptied:
                self._home.put_back(kept, self._home.fetch(kept).zero_())
            state.refreshed_at = state.num_microbatches

    def _unite(self, state: State, window: Window) -> None:
        """On the owner: this window's sketches and the estimate of the earlier ones become the new estimate."""
        K, fetch = state.matrix.width, self._home.fetch
        P_MK, Q_NK = self._bases(state, window)
        Y_MK, Z_NK, E_MS = fetch(window.Y_MK), fetch(window.Z_NK), fetch(state.E_2MS).sum(dim=0)
        QPhi_NC = fetch(window.QPhi_NC)
        if not state.refining:
            Phi_NS = QPhi_NC[:, K:].float()
            window_E_MS = E_MS if state.earlier_E_MS is None else E_MS - fetch(state.earlier_E_MS)
            # P P^T G + (I - P P^T) G Q Q^T on Phi
            outside = Y_MK @ (Q_NK.T @ Phi_NS)
            held_MS = outside + P_MK @ (Z_NK.T @ Phi_NS - P_MK.T @ outside)
            state.captures.append(_share_held(held_MS, window_E_MS))
        if state.S_J is not None:
            # the carried estimate joins after the reduce, or it would count once per rank; its vectors lead P and Q
            J = len(state.S_J)
            Y_MK[:, :J] += P_MK[:, :J] * state.S_J
            Z_NK[:, :J] += Q_NK[:, :J] * state.S_J
        svd = boolean_sum(Y_MK, Z_NK, P_MK, Q_NK, K)
        state.S_J = svd.S_K
        generator = self._generator(f"{state.matrix.name}/refresh{state.num_microbatches}")
        P_MK, Q_NK = complete_basis(svd.U_MK, K, generator), complete_basis(svd.Vh_KN.T, K, generator)
        QPhi_NC[:, :K] = Q_NK
        self._home.put_back(window.P_MK, fetch(window.P_MK).copy_(P_MK))
        self._home.put_back(window.QPhi_NC, QPhi_NC)
        self._keep_rest(state, window, P_MK, Q_NK)
        state.earlier_E_MS = self._home.keep(E_MS)

    def _result(self, state: State, num_tokens: int) -> GradientSVD:
        """On the owner: `width` triplets; those beyond the estimate have singular value 0 and arbitrary vectors."""
        matrix, fetch = state.matrix, self._home.fetch
        K = matrix.width
        if state.window is None:  # no token reached this target
            generator = self._generator(f"{matrix.name}/padding")
            P_MK, Q_NK = (
                complete_basis(torch.zeros(rows, 0, device=self._device), K, generator) for rows in (matrix.M, matrix.N)
            )
            S_J = torch.zeros(0, device=self._device)
            Phi_NS = torch.zeros(matrix.N, ERROR_COLUMNS, device=self._device)
        else:
            assert state.S_J is not None
            (P_MK, Q_NK), S_J = self._bases(state, state.window), state.S_J
            Phi_NS = fetch(state.window.QPhi_NC)[:, K:].float()
        svd = TruncatedSVD(
            U_MK=P_MK, S_K=torch.cat([S_J, S_J.new_zeros(K - len(S_J))]) / num_tokens, Vh_KN=Q_NK.T.contiguous()
        )
        E_2MS = fetch(state.E_2MS)
        wanted, E_MS = svd.leading(matrix.num_triplets), E_2MS.sum(dim=0) / num_tokens
        held_MS = wanted.U_MK @ (wanted.S_K[:, None] * (wanted.Vh_KN @ Phi_NS))
        return GradientSVD(
            svd=svd,
            captured_energy=_share_held(held_MS, E_MS),
            split_half_cosine=split_half_cosine(E_2MS, len(self._halves_seen)),
            subspace_cosine=split_half_cosine(wanted.U_MK.T @ E_2MS, len(self._halves_seen)),
            window_capture=_worst_against_best_before(state.captures),
        )

    def _few_rows(self, matrix: Matrix, x_TN: Tensor, dy_TM: Tensor) -> tuple[Tensor, Tensor]:
        """x and dy as they are while the window that takes their place is no smaller, else a product close to theirs.

        The product is found by subspace iteration on the factors and has 2K rows.
        """
        itemsize = max(x_TN.itemsize, dy_TM.itemsize)
        width = kept_rows(matrix, len(x_TN), itemsize)
        if width == len(x_TN):
            return x_TN, dy_TM
        V_NK = torch.randn(matrix.N, width, generator=self._generator(f"{matrix.name}/cold")).to(x_TN.device)
        U_MK, _ = orthonormal_columns(_product(dy_TM, x_TN, V_NK))
        V_NK, _ = orthonormal_columns(_product(x_TN, dy_TM, U_MK))
        # G V V^T, as "rows" V^T of x and (G V)^T of dy
        return V_NK.t().to(x_TN.dtype), _product(dy_TM, x_TN, V_NK).t().to(dy_TM.dtype)

    def _generator(self, name: str) -> torch.Generator:
        # on the CPU, so that ranks draw the same numbers whatever their devices are
        return seeded_generator(self._seed, name, torch.device("cpu"))


def _product(left_TM: Tensor, right_TN: Tensor, basis_NK: Tensor) -> Tensor:
    """left^T (right basis), float32."""
    return (left_TM.t() @ (right_TN @ basis_NK.to(right_TN.dtype))).float()


def _share_held(held_MS: Tensor, E_MS: Tensor) -> float:
    """1 - ||(G - H) Phi||^2 / ||G Phi||^2 from H Phi and G Phi, an estimate of the energy share of G that H holds."""
    rest = torch.linalg.vector_norm(E_MS - held_MS, dtype=torch.float64).square()
    whole = torch.linalg.vector_norm(E_MS, dtype=torch.float64).square()
    return 1 - (rest / whole).item() if whole else 0.0


def _worst_against_best_before(captures: Sequence[float]) -> float | None:
    ratios = [capture / max(captures[:i]) for i, capture in enumerate(captures) if i and max(captures[:i]) > 0]
    return min(ratios, default=None)
