"""The sketch engine: the truncated SVD of every mean gradient while the data streams by once; no M x N is ever formed.

Per target and token, with bases P_MK and Q_NK: Y_MK += dy (Q^T x)^T and Z_NK += x (P^T dy)^T, so that Y = G Q and
Z = G^T P over a window of global microbatches. At the end of a window the ranks' sketches are summed on the target's
owner, united with what earlier windows found (`linalg.boolean_sum`), and only the new bases travel back. Each refresh
multiplies the estimate by new data, a step of subspace iteration that costs no pass of its own; windows double. Owners
unite matrices of one shape as one batch: on a GPU a small eigenproblem each would cost more than the pass.

The first microbatch that reaches a matrix has no bases yet. Each rank keeps its x and dy of it, or a low-rank product
that stands for them if they have many rows, until the ranks have found bases together; then it is sketched like any
other data. A routed matrix has windows of its own: only microbatches that sent some rank a row count.
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
    drop_noise_,
    gather_on_owner_,
    naming,
    require_entries,
    seeded_generator,
    split_half_cosine,
)
from loraga_dist.engines.home import StateHome
from loraga_dist.engines.product import dtype_of_products, rows_with_gradient
from loraga_dist.engines.sketch_state import SketchCosts, State, Window, equal_batches, kept_rows
from loraga_dist.engines.sketch_union import shares_held, unite
from loraga_dist.linalg import TruncatedSVD, complete_bases, orthonormal_columns

COLD_ITERATIONS = 2
"""Rounds of subspace iteration on the first microbatch's gradient."""


class SketchEngine(SketchCosts):
    """Sketches every gradient in one pass; see the module's docstring."""

    refines: ClassVar[bool] = True

    def __init__(self, matrices: Sequence[Matrix], *, home: StateHome, seed: int, dtype: torch.dtype) -> None:
        """dtype: of x and dy; data of another dtype is right, too, but the bases are cast for it every time."""
        super().__init__(matrices, home=home, seed=seed, dtype=dtype_of_products(dtype))
        self._device = home.device
        self._rows_here: dict[str, Tensor] = {}
        """With a gradient, of the microbatch at hand, where `_reached` asks for them; int64 []."""
        self._states = {
            matrix.name: State(
                matrix=matrix, E_2MS=home.keep(torch.zeros(2, matrix.M, ERROR_COLUMNS, device=home.device))
            )
            for matrix in matrices
        }

    def observe(self, name: str, x_TN: Tensor, dy_TM: Tensor) -> None:
        state = self._states[name]
        if state.window is None or state.matrix.is_routed:
            count = rows_with_gradient(x_TN, dy_TM).sum()
            self._rows_here[name] = self._rows_here[name] + count if name in self._rows_here else count
        x_TN, dy_TM = (rows.to(dtype_of_products(rows.dtype)) for rows in (x_TN, dy_TM))
        if state.window is None:
            self._keep_cold(state, x_TN, dy_TM)
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

    def _fetched(self, rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self._home.fetch(rows[0]), self._home.fetch(rows[1])

    def _add(self, kept: Tensor, increment: Tensor) -> None:
        accumulator = self._home.fetch(kept)
        self._home.put_back(kept, accumulator.add_(increment))

    def end_microbatch(self, world: Collectives) -> None:
        """A collective: starts targets that have seen their first token, refreshes those whose window is full."""
        reached = self._reached(world)
        self._start([state for state in reached if state.window is None], world)
        due = []
        for state in reached:
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
                cosines.append(split_half_cosine(E_2MS))
        return cosines

    def begin_refinement(self, world: Collectives) -> None:
        """Between two passes over the same data: the estimate becomes the bases, and all data is seen again with them.

        A collective. The union of both projections onto good bases is exact to second order in their error.
        """
        self._refresh(self._unfinished(), world)
        for state in self._states.values():
            if state.S_K is not None:
                state.S_K.zero_()
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
                if state.window is not None:
                    assert state.S_K is not None and state.earlier_E_MS is not None
                    kept |= {"S": state.S_K, "earlier_E": state.earlier_E_MS}
                    kept["P"], kept["Q"] = state.bases(self._home)
                tensors |= {f"{name}/{part}": self._home.fetch(tensor).cpu() for part, tensor in kept.items()}
        counts = {
            name: [state.window is not None, state.refining, state.num_microbatches, state.refreshed_at, state.num_rows]
            for name, state in self._states.items()
        }
        return EngineState({"counts": counts}, tensors)

    def load_state(self, content: dict[str, Any], tensors: Tensors, world: Collectives) -> None:
        for name, state in self._states.items():
            started, *counts = content["counts"][name]
            state.refining, state.num_microbatches, state.refreshed_at, state.num_rows = counts
            is_owner = state.matrix.owner == world.rank
            if started:
                P_MK, Q_NK = (tensors[f"{name}/{part}"].to(self._device) for part in "PQ")
                window = self._open(state, P_MK, Q_NK, is_owner=is_owner)
                if is_owner:
                    assert state.S_K is not None and state.earlier_E_MS is not None
                    state.S_K.copy_(tensors[f"{name}/S"])
                    for kept, part in ((window.Y_MK, "Y"), (window.Z_NK, "Z"), (state.earlier_E_MS, "earlier_E")):
                        self._home.put_back(kept, tensors[f"{name}/{part}"].to(self._device))
            if is_owner:
                self._home.put_back(state.E_2MS, tensors[f"{name}/E"].to(self._device))
                state.captures = tensors[f"{name}/captures"].tolist()

    @classmethod
    def check_state(cls, matrix: Matrix, content: dict[str, Any], saved: Entries) -> None:
        counts = content["counts"][matrix.name]
        started, _, num_microbatches, refreshed_at, num_rows = counts
        is_typed = [type(count) for count in counts] == [bool, bool, int, int, int]
        if not is_typed or not 0 <= refreshed_at <= num_microbatches or num_rows < 0:
            raise ValueError(f"{matrix.name} has the counts {counts}")
        M, N, K, float32 = matrix.M, matrix.N, matrix.width, torch.float32
        # of as many windows as there were
        (windows,) = saved["captures"][1]
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "E": (float32, (2, M, ERROR_COLUMNS)), "captures": (torch.float64, (windows,))
        }  # fmt: skip
        if started:
            expected |= {name: (float32, (rows, K)) for name, rows in (("Y", M), ("Z", N), ("P", M), ("Q", N))}
            expected |= {"S": (float32, (K,)), "earlier_E": (float32, (M, ERROR_COLUMNS))}
        require_entries(saved, expected)

    def collect(self, world: Collectives) -> None:
        self._reduce(self._unfinished(), world)
        self._states = {name: state for name, state in self._states.items() if state.matrix.owner == world.rank}

    def results(self, num_tokens: int) -> Iterator[tuple[str, GradientSVD]]:
        for batch in equal_batches(self._states.values()):
            self._unite([state for state in batch if state.is_unfinished])
            self._start_anywhere([state for state in batch if state.window is None])
            for state in batch:
                with naming(state.matrix):
                    result = self._result(self._states.pop(state.matrix.name), num_tokens)
                yield state.matrix.name, result

    def _unfinished(self) -> list[State]:
        return [state for state in self._states.values() if state.is_unfinished]

    def _reached(self, world: Collectives) -> list[State]:
        """Those that have bases or can have them now, unless they are routed and no row of theirs has a gradient.

        A collective while there is one of which this is not known beforehand.
        """
        asked = [name for name, state in self._states.items() if state.window is None or state.matrix.is_routed]
        unreached = set()
        for name, rows in self._sum_rows(asked, world).items():
            state = self._states[name]
            if not state.refining:
                state.num_rows += rows
            if not rows:
                unreached.add(name)
                state.cold.clear()
        return [state for name, state in self._states.items() if name not in unreached]

    def _sum_rows(self, names: Sequence[str], world: Collectives) -> dict[str, int]:
        """How many rows with a gradient these have in the microbatch at hand, on all ranks."""
        if not names:
            return {}
        none = torch.zeros((), dtype=torch.int64, device=self._device)
        rows = torch.stack([self._rows_here.get(name, none) for name in names])
        self._rows_here.clear()
        return dict(zip(names, map(int, world.sum_(rows.double()).tolist()), strict=True))

    def _start(self, states: Sequence[State], world: Collectives) -> None:
        """Bases from the first microbatch by subspace iteration over ranks; then its sketch, as of any other data."""
        for batch in equal_batches(states):
            matrix, generators = batch[0].matrix, [self._generator(state, "start") for state in batch]
            X_BMK = torch.zeros(len(batch), matrix.M, matrix.width, device=self._device)
            random = [torch.randn(matrix.N, matrix.width, generator=generator) for generator in generators]
            X_BNK = torch.stack(random).to(self._device)
            for _ in range(COLD_ITERATIONS):
                X_BMK.zero_()
                for state, X_MK, X_NK in zip(batch, X_BMK, X_BNK, strict=True):
                    for x_TN, dy_TM in map(self._fetched, state.cold):
                        X_MK += _product(dy_TM, x_TN, X_NK)
                self._share_bases(X_BMK, batch, generators, world)
                X_BNK.zero_()
                for state, X_MK, X_NK in zip(batch, X_BMK, X_BNK, strict=True):
                    for x_TN, dy_TM in map(self._fetched, state.cold):
                        X_NK += _product(x_TN, dy_TM, X_MK)
                self._share_bases(X_BNK, batch, generators, world)
            for state, P_MK, Q_NK in zip(batch, X_BMK, X_BNK, strict=True):
                window = self._open(state, P_MK, Q_NK, is_owner=world.rank == matrix.owner)
                for x_TN, dy_TM in map(self._fetched, state.cold):
                    self._sketch(state, window, x_TN, dy_TM)
                state.cold.clear()

    def _share_bases(
        self, X_BMK: Tensor, batch: Sequence[State], generators: Sequence[torch.Generator], world: Collectives
    ) -> None:
        """Put orthonormal columns that span the sum over ranks in its place."""
        owner = batch[0].matrix.owner
        world.reduce_(X_BMK, owner)
        if world.rank == owner:
            with naming(batch[0].matrix, len(batch) - 1):
                W_BMK, held_BK = orthonormal_columns(X_BMK)
                X_BMK.copy_(complete_bases([W_BMK], held_BK, generators)[0])
        world.broadcast_(X_BMK, owner)

    def _start_anywhere(self, states: Sequence[State]) -> None:
        """On the owner: bases for matrices of one shape that no token has reached."""
        if states:
            matrix, B = states[0].matrix, len(states)
            none = [torch.zeros(B, rows, matrix.width, device=self._device) for rows in (matrix.M, matrix.N)]
            is_held = torch.zeros(B, matrix.width, dtype=torch.bool, device=self._device)
            bases = complete_bases(none, is_held, [self._generator(state, "padding") for state in states])
            for state, P_MK, Q_NK in zip(states, *bases, strict=True):
                self._open(state, P_MK, Q_NK, is_owner=True)

    def _open(self, state: State, P_MK: Tensor, Q_NK: Tensor, *, is_owner: bool) -> Window:
        """Begin a first window, empty, with these bases; copies of them."""
        matrix, home = state.matrix, self._home
        Phi_NS = torch.randn(matrix.N, ERROR_COLUMNS, generator=self._generator(state, "error"))
        state.window = Window(
            P_MK=home.keep(P_MK.to(self._dtype, copy=True)),
            QPhi_NC=home.keep(torch.cat([Q_NK, Phi_NS.to(self._device)], dim=1).to(self._dtype)),
            Y_MK=home.keep(torch.zeros_like(P_MK)),
            Z_NK=home.keep(torch.zeros_like(Q_NK)),
        )
        if is_owner:
            state.S_K = torch.zeros(matrix.width, device=self._device)
            state.earlier_E_MS = home.keep(torch.zeros(matrix.M, ERROR_COLUMNS, device=self._device))
            state.keep_rest(home, P_MK, Q_NK)
        return state.window

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
        for batch in equal_batches(state for state, _ in windows if state.matrix.owner == world.rank):
            self._unite(batch)
        for state, window in windows:
            for kept in (window.P_MK, window.QPhi_NC):
                self._home.put_back(kept, world.broadcast_(self._home.fetch(kept), state.matrix.owner))
            emptied = [window.Y_MK, window.Z_NK]
            if state.matrix.owner != world.rank:  # the owner has it all now
                emptied.append(state.E_2MS)
            for kept in emptied:
                self._home.put_back(kept, self._home.fetch(kept).zero_())
            state.refreshed_at = state.num_microbatches

    def _unite(self, states: Sequence[State]) -> None:
        """On the owner: the estimate of each takes in its window; of matrices of one shape."""
        if states:
            uses = (f"refresh{state.num_microbatches}" for state in states)
            unite(states, self._home, [self._generator(*each) for each in zip(states, uses, strict=True)])

    def _result(self, state: State, num_tokens: int) -> GradientSVD:
        """On the owner: `width` triplets; those beyond the estimate have singular value 0 and arbitrary vectors."""
        matrix, fetch = state.matrix, self._home.fetch
        assert state.window is not None and state.S_K is not None
        P_MK, Q_NK = state.bases(self._home)
        Phi_NS = fetch(state.window.QPhi_NC)[:, matrix.width :].float()
        if matrix.is_routed:
            drop_noise_(state.S_K, state.num_rows)
        svd = TruncatedSVD(U_MK=P_MK, S_K=state.S_K / num_tokens, Vh_KN=Q_NK.T.contiguous())
        E_2MS = fetch(state.E_2MS)
        wanted, E_MS = svd.leading(matrix.num_triplets), E_2MS.sum(dim=0) / num_tokens
        held_MS = wanted.U_MK @ (wanted.S_K[:, None] * (wanted.Vh_KN @ Phi_NS))
        return GradientSVD(
            svd=svd,
            captured_energy=shares_held(held_MS[None], E_MS[None])[0],
            split_half_cosine=split_half_cosine(E_2MS),
            subspace_cosine=split_half_cosine(wanted.U_MK.T @ E_2MS),
            window_capture=_worst_against_best_before(state.captures),
        )

    def _keep_cold(self, state: State, x_TN: Tensor, dy_TM: Tensor) -> None:
        """Beside other parts of the microbatch, and no more than all at once would be: an output head gets a long
        sequence by some tokens at a time."""
        x_TN, dy_TM = self._few_rows(state, x_TN, dy_TM)
        if state.cold:
            parts = [*map(self._fetched, state.cold), (x_TN, dy_TM)]
            num_rows, itemsize = sum(len(x) for x, _ in parts), max(x_TN.itemsize, dy_TM.itemsize)
            if kept_rows(state.matrix, num_rows, itemsize) < num_rows:
                x_TN, dy_TM = self._few_rows(state, *map(torch.cat, zip(*parts, strict=True)))
                state.cold.clear()
        state.cold.append((self._home.keep(x_TN), self._home.keep(dy_TM)))

    def _few_rows(self, state: State, x_TN: Tensor, dy_TM: Tensor) -> tuple[Tensor, Tensor]:
        """x and dy as they are while the window that takes their place is no smaller, else a product close to theirs.

        The product is found by subspace iteration on the factors and has 2K rows.
        """
        itemsize = max(x_TN.itemsize, dy_TM.itemsize)
        width = kept_rows(state.matrix, len(x_TN), itemsize)
        if width == len(x_TN):
            return x_TN, dy_TM
        V_NK = torch.randn(x_TN.shape[1], width, generator=self._generator(state, "cold")).to(x_TN.device)
        U_MK = orthonormal_columns(_product(dy_TM, x_TN, V_NK)[None])[0][0]
        V_NK = orthonormal_columns(_product(x_TN, dy_TM, U_MK)[None])[0][0]
        # G V V^T, as "rows" V^T of x and (G V)^T of dy
        return V_NK.t().to(x_TN.dtype), _product(dy_TM, x_TN, V_NK).t().to(dy_TM.dtype)

    def _generator(self, state: State, use: str) -> torch.Generator:
        # on the CPU, so that ranks draw the same numbers whatever their devices are
        return seeded_generator(self._seed, f"{state.matrix.name}/{use}", torch.device("cpu"))


def _product(left_TM: Tensor, right_TN: Tensor, basis_NK: Tensor) -> Tensor:
    """left^T (right basis), float32."""
    return (left_TM.t() @ (right_TN @ basis_NK.to(right_TN.dtype))).float()


def _worst_against_best_before(captures: Sequence[float]) -> float | None:
    ratios = [capture / max(captures[:i]) for i, capture in enumerate(captures) if i and max(captures[:i]) > 0]
    return min(ratios, default=None)
