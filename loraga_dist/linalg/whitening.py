"""Second moments of a layer's inputs, and the map that makes inputs white, so that a step of any input counts alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WHITENINGS: dict[str, Callable[[int], int | None]] = {
    "lowrank": lambda N: min(128, N),
    "exact": lambda N: N,
    "diagonal": lambda N: 0,
    "none": lambda N: None,
}
"""How many directions of the input's second moment are known beside its diagonal, of N; None: it is not asked for."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Sums over tokens of x * x and of x (x^T Omega); over ranks they add up."""

    squares_N: Tensor
    """float64."""
    Y_NK: Tensor
    """float32. K is 0 where the diagonal is all that is wanted, and N for the whole second moment."""
    num_tokens: Tensor
    omega_NK: Tensor | None
    """float32, random; None for the identity."""

    @classmethod
    def zeros(cls, N: int, width: int, generator: torch.Generator, device: torch.device) -> Moments:
        """generator: on the CPU, so that ranks draw the same numbers whatever their devices are."""
        return cls(
            squares_N=torch.zeros(N, dtype=torch.float64, device=device),
            Y_NK=torch.zeros(N, width, device=device),
            num_tokens=torch.zeros((), dtype=torch.float64, device=device),
            omega_NK=torch.randn(N, width, generator=generator).to(device) if width < N else None,
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sums."""
        return self.squares_N, self.Y_NK, self.num_tokens

    @staticmethod
    def num_bytes(N: int, width: int) -> int:
        """Of the sums and Omega, for what `zeros` makes."""
        return 8 * (N + 1) + 4 * N * width * (2 if width < N else 1)

    def add_(self, x_TN: Tensor) -> None:
        x_TN = x_TN.float()
        self.squares_N.add_(x_TN.square().sum(dim=0))
        self.num_tokens.add_(len(x_TN))
        if self.Y_NK.shape[1]:
            self.Y_NK.addmm_(x_TN.T, x_TN if self.omega_NK is None else x_TN @ self.omega_NK)


@dataclass(frozen=True, kw_only=True)
class Whitening:
    """x~ = (I + Q F Q^T) D^(-1/2) x, whose second moment is near the identity; float32.

    The damped second moment of x is taken as D^(1/2) (I + Q ((I + F)^(-2) - I) Q^T) D^(1/2), diagonal and low rank.
    """

    scale_N: Tensor
    """D^(-1/2)."""
    Q_NK: Tensor
    """Orthonormal columns."""
    F_K: Tensor
    effective_rank: Tensor
    """(tr C)^2 / ||C||_F^2 without damping, float64; NaN where only the diagonal of C is known."""

    @classmethod
    @torch.no_grad()
    def of(cls, moments: Moments, damping: float) -> Whitening:
        """Find the map from the sums over all ranks. damping: of the mean of the diagonal, added to all of it.

        The low rank part is the Nystroem approximation (Tropp, Yurtsever, Udell, Cevher 2017, arXiv 1706.05736,
        algorithm 3) of the moment scaled to a diagonal of ones; D is what is left of the diagonal.
        """
        num_tokens = moments.num_tokens.clamp(min=1)
        diagonal_N = moments.squares_N / num_tokens
        added = damping * diagonal_N.mean().clamp(min=torch.finfo(torch.float32).tiny)
        scale_N = (diagonal_N + added).rsqrt()
        added_N = added * scale_N.square()
        Y_NK = scale_N[:, None] * (moments.Y_NK.double() / num_tokens)
        if moments.omega_NK is None:
            values_K, Q_NK = torch.linalg.eigh(Y_NK * scale_N + added_N.diag())
            F_K = values_K.rsqrt() - 1
        else:
            L_NK = _nystroem(Y_NK, moments.omega_NK.double() / scale_N[:, None])
            rest_N = (1 - L_NK.square().sum(dim=1)).maximum(added_N)
            scale_N *= rest_N.rsqrt()
            Q_NK, S_K, _ = torch.linalg.svd(rest_N.rsqrt()[:, None] * L_NK, full_matrices=False)
            F_K = (1 + S_K.square()).rsqrt() - 1
        return cls(
            scale_N=scale_N.float(),
            Q_NK=Q_NK.float().contiguous(),
            F_K=F_K.float(),
            effective_rank=_effective_rank(moments),
        )

    @staticmethod
    def num_bytes(N: int, width: int) -> int:
        return 4 * (N * (width + 1) + width) + 8

    @staticmethod
    def workspace_bytes(N: int, width: int) -> int:
        """Taken for a moment by `of`, beside the sums: about five float64 copies of Y."""
        return 40 * N * width

    def rows(self, x_TN: Tensor) -> Tensor:
        """x~ of every row, in the dtype of x."""
        dtype = x_TN.dtype
        scaled_TN = x_TN * self.scale_N.to(dtype)
        if not len(self.F_K):
            return scaled_TN
        return torch.addmm(scaled_TN, (scaled_TN @ self.Q_NK.to(dtype)) * self.F_K.to(dtype), self.Q_NK.to(dtype).T)

    def transposed(self, V_RN: Tensor) -> Tensor:
        """V W for the W of x~ = W x: rows that give for x what those of V give for x~. In the dtype of V."""
        dtype = V_RN.dtype
        Q_NK = self.Q_NK.to(dtype)
        return (V_RN + (V_RN @ Q_NK) * self.F_K.to(dtype) @ Q_NK.T) * self.scale_N.to(dtype)


def _effective_rank(moments: Moments) -> Tensor:
    N, width = moments.Y_NK.shape
    # ||C Omega||_F^2 is ||C||_F^2 times the width, in the mean
    square_norm = torch.linalg.vector_norm(moments.Y_NK, dtype=torch.float64).square()
    if moments.omega_NK is not None:
        square_norm /= width or torch.nan
    return (moments.squares_N.sum().square() / square_norm).clamp(max=N)


def _nystroem(Y_NK: Tensor, omega_NK: Tensor) -> Tensor:
    """L whose L L^T approximates C from Y = C Omega, from below; float64."""
    shift = torch.finfo(torch.float32).eps * torch.linalg.vector_norm(Y_NK)
    shifted_NK = Y_NK + shift * omega_NK
    gram_KK = omega_NK.T @ shifted_NK
    values_K, vectors_KK = torch.linalg.eigh((gram_KK + gram_KK.T) / 2)
    floor = torch.finfo(torch.float32).eps * torch.linalg.vector_norm(gram_KK).clamp(
        min=torch.finfo(torch.float32).tiny
    )
    Q_NK, S_K, _ = torch.linalg.svd(shifted_NK @ (vectors_KK * values_K.clamp(min=floor).rsqrt()), full_matrices=False)
    return Q_NK * (S_K.square() - shift).clamp(min=0).sqrt()
