"""The exact engine: G_MN in float32 for one group of targets at a time, reduced to its owner and factorized there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from loraga_dist.engines.base import (
    ERROR_COLUMNS,
    Collectives,
    EngineState,
    Entries,
    GradientEngine,
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
from loraga_dist.engines.product import add_product_, rows_with_gradient, thin_product
from loraga_dist.linalg import TruncatedSVD, truncated_svd, truncated_svd_bytes

OVERSAMPLING = 32
"""Columns of the randomized SVD beyond the wanted ones, unless the user says otherwise."""


class ExactEngine(GradientEngine):
    """Accumulates G_MN = sum over tokens of dy x^T in float32, whatever the dtype of the data."""

    def __init__(self, matrices: Sequence[Matrix], *, home: StateHome, seed: int, dtype: torch.dtype) -> None:
        super().__init__(matrices, home=home, seed=seed, dtype=dtype)
        self._G: dict[str, torch.Tensor] = {}
        self._E: dict[str, torch.Tensor] = {}
        self._Phi: dict[str, torch.Tensor] = {}
        self._num_rows: dict[str, torch.Tensor] = {}
        """Of routed matrices: those with a gradient, float64 []."""
        for matrix in matrices:
            self._G[matrix.name] = home.keep(torch.zeros(matrix.M, matrix.N, device=home.device))
            self._E[matrix.name] = torch.zeros(2, matrix.M, ERROR_COLUMNS, device=home.device)
            generator = seeded_generator(seed, f"{matrix.name}/error", torch.device("cpu"))
            self._Phi[matrix.name] = torch.randn(matrix.N, ERROR_COLUMNS, generator=generator).to(home.device)
            if matrix.is_routed:
                self._num_rows[matrix.name] = torch.zeros((), dtype=torch.float64, device=home.device)

    def observe(self, name: str, x_TN: torch.Tensor, dy_TM: torch.Tensor) -> None:
        if name in self._num_rows:
            self._num_rows[name] += rows_with_gradient(x_TN, dy_TM).sum()
        kept, E_2MS, Phi_NS = self._G[name], self._E[name], self._Phi[name]
        G_MN = self._home.fetch(kept)
        add_product_(G_MN, dy_TM, x_TN)
        (T, N), M = x_TN.shape, dy_TM.shape[1]
        if T * (M + N) < M * N:
            add_product_(E_2MS[self._half], dy_TM, thin_product(x_TN, Phi_NS))
        else:  # fewer flops: both halves together are G Phi
            torch.addmm(E_2MS[1 - self._half], G_MN, Phi_NS, beta=-1, out=E_2MS[self._half])
        self._home.put_back(kept, G_MN)

    def end_microbatch(self, world: Collectives) -> None:
        """Nothing: sums stay on their ranks until the last microbatch."""

    def split_half_cosines(self, world: Collectives) -> list[float | None]:
        cosines = []
        for matrix in self._matrices.values():
            E_2MS = self._E[matrix.name].clone()  # the sum must not count again when the sweep ends
            world.reduce_(E_2MS, matrix.owner)
            if matrix.owner == world.rank:
                cosines.append(split_half_cosine(E_2MS))
        return cosines

    def save_state(self, world: Collectives) -> EngineState:
        tensors = {}
        for name, matrix in self._matrices.items():
            for part, kept in self._kept(name).items():
                sums = self._home.fetch(kept)
                is_owner = gather_on_owner_(sums, matrix.owner, world)
                self._home.put_back(kept, sums)
                if is_owner:
                    tensors[f"{name}/{part}"] = sums.cpu()
        return EngineState({}, tensors)

    def load_state(self, content: dict[str, Any], tensors: Tensors, world: Collectives) -> None:
        for name, matrix in self._matrices.items():
            if matrix.owner == world.rank:
                for part, kept in self._kept(name).items():
                    self._home.put_back(kept, tensors[f"{name}/{part}"].to(self._home.device))

    @classmethod
    def check_state(cls, matrix: Matrix, content: dict[str, Any], saved: Entries) -> None:
        M, N = matrix.M, matrix.N
        expected: Entries = {"G": (torch.float32, (M, N)), "E": (torch.float32, (2, M, ERROR_COLUMNS))}
        require_entries(saved, {**expected, "rows": (torch.float64, ())} if matrix.is_routed else expected)

    def _kept(self, name: str) -> dict[str, torch.Tensor]:
        """Sums over microbatches."""
        kept = {"G": self._G[name], "E": self._E[name]}
        return kept | {"rows": self._num_rows[name]} if name in self._num_rows else kept

    def collect(self, world: Collectives) -> None:
        for name, matrix in self._matrices.items():
            for kept in self._kept(name).values():
                sums = self._home.fetch(kept)
                world.reduce_(sums, matrix.owner)
                self._home.put_back(kept, sums)
            del self._Phi[name]
            if matrix.owner != world.rank:
                del self._G[name], self._E[name]

    def mean_gradients(self, num_tokens: int) -> Iterator[tuple[Matrix, torch.Tensor]]:
        """Hand over the gradients that were collected and are owned, G_MN in float32, one by one."""
        for name in list(self._G):
            yield self._matrices[name], self._home.fetch(self._G.pop(name)).div_(num_tokens)

    def results(self, num_tokens: int) -> Iterator[tuple[str, GradientSVD]]:
        for matrix, G_MN in self.mean_gradients(num_tokens):
            with naming(matrix):
                svd = self.svd(matrix, G_MN)
                if matrix.is_routed:
                    drop_noise_(svd.S_K, int(self._num_rows[matrix.name]))
                wanted = svd.S_K[: matrix.num_triplets].double().square().sum().item()
                whole = torch.linalg.vector_norm(G_MN, dtype=torch.float64).square().item()
            E_2MS = self._E.pop(matrix.name)
            found = GradientSVD(
                svd=svd,
                captured_energy=wanted / whole if whole else 0.0,
                split_half_cosine=split_half_cosine(E_2MS),
                subspace_cosine=split_half_cosine(svd.leading(matrix.num_triplets).U_MK.T @ E_2MS),
            )
            yield matrix.name, found

    def svd(self, matrix: Matrix, G_MN: torch.Tensor) -> TruncatedSVD:
        """The leading `matrix.width` triplets of one mean gradient, on its device."""
        return truncated_svd(
            G_MN,
            rank=matrix.num_triplets,
            oversampling=matrix.width - matrix.num_triplets,
            generator=seeded_generator(self._seed, matrix.name, self._home.device),
        )

    @staticmethod
    def width(num_triplets: int, M: int, N: int, oversampling: int | None) -> int:
        return min(num_triplets + (OVERSAMPLING if oversampling is None else oversampling), M, N)

    @staticmethod
    def state_bytes(matrix: Matrix) -> int:
        return 4 * (matrix.M * matrix.N + (2 * matrix.M + matrix.N) * ERROR_COLUMNS)

    @staticmethod
    def observation_bytes(matrix: Matrix, dtype: torch.dtype, num_tokens: int) -> int:
        sketches = 4 * ERROR_COLUMNS * max(num_tokens, matrix.M)
        if dtype == torch.float32:
            return sketches
        # float32 copies of x and dy, or their product before it is added
        return sketches + 4 * max(num_tokens * (matrix.M + matrix.N), matrix.M * matrix.N)

    @staticmethod
    def factorization_bytes(matrix: Matrix) -> int:
        # the energy of G is summed in float64, which a CPU makes a copy for
        return max(truncated_svd_bytes(matrix.M, matrix.N, matrix.width), 8 * matrix.M * matrix.N)

    @staticmethod
    def factorization_cost(matrix: Matrix) -> int:
        """Measured with gradients of Llamas of 256 to 2048 columns, r = 8, float32, within a factor of 1.5."""
        M, N, K = matrix.M, matrix.N, matrix.width
        return 100 * M * N * K + 250 * K**2 * (M + N)

    @staticmethod
    def flops_per_token(matrix: Matrix) -> int:
        return 2 * matrix.M * matrix.N

    @staticmethod
    def traffic_bytes(matrix: Matrix, num_microbatches: int, refine_passes: int) -> int:
        return 4 * matrix.M * matrix.N
