"""The best low-rank matrices that two one-sided projections of each G determine, and the bases they need.

Batched: B matrices of one shape at a time, whose small matrices are one call each. What a matrix lacks in rank are
columns of zero, so that no shape depends on data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraga_dist.linalg.randomized_svd import sign_fix

_DROP = 1e-5
"""Directions below this share of the matrix they come from are rounding, not directions."""
_BLOCK_ROWS = 1 << 11
"""Rows of all matrices held in float64 at a time: few enough to stay in cache."""
_LEAST_BLOCK_ROWS = 1 << 8
"""Of each matrix: fewer would be many calls."""


@torch.no_grad()
def boolean_sum(
    Y_BMK: Tensor, Z_BNK: Tensor, P_BMK: Tensor, Q_BNK: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the leading `width` triplets of M = P P^T G + G Q Q^T - P P^T G Q Q^T, from Y = G Q and Z = G^T P alone.

    Gives U_BMW, S_BW, V_BNW. P, Q: orthonormal columns, float32. The error G - M is (I - P P^T) G (I - Q Q^T): nothing
    else is lost, and no pseudo-inverse is taken. Y and Z may be rank-deficient, as after fewer tokens than K; the last
    singular values are then zero, and so are their vectors. All others are orthonormal.

    Source: the Boolean sum of two projectors (Gordon 1969); Halko, Martinsson, Tropp 2011, section 5 for the use of
    two-sided sketches.
    """
    left, right = _splits((Y_BMK, P_BMK), (Z_BNK, Q_BNK))
    core = _block_matrices(left.C_BIK, right.R_BKK.mT, left.R_BKK)
    # by eigenvectors, which devices have in batches; what squaring loses is below what is dropped
    energy_BL, V_BLL = torch.linalg.eigh(core.mT @ core)
    S_BW, V_BLW = energy_BL.flip(-1)[:, :width].clamp(min=0).sqrt(), V_BLL.flip(-1)[:, :, :width]
    S_BW = torch.where(_DROP * S_BW[:, :1] < S_BW, S_BW, 0)
    inverse_BW = torch.where(S_BW.float() > 0, S_BW.reciprocal(), 0)
    U_BLW, V_BLW = core @ (V_BLW * inverse_BW[:, None]), V_BLW * (inverse_BW > 0)[:, None]
    U_BMW, Vh_BWN = sign_fix(left.combine(U_BLW), right.combine(V_BLW).mT)
    return U_BMW, S_BW.float(), Vh_BWN.mT


@torch.no_grad()
def orthonormal_columns(X_BMK: Tensor) -> tuple[Tensor, Tensor]:
    """Find orthonormal columns W_BMK that span each X up to rounding, and held_BK: which they are; others are zero."""
    (split,) = _splits((X_BMK, X_BMK[:, :, :0]))
    K = X_BMK.shape[2]
    return split.combine(torch.eye(K, dtype=split.mix_BLK.dtype, device=X_BMK.device)), split.held_BK


@torch.no_grad()
def complete_bases(bases: Sequence[Tensor], held_BK: Tensor, generators: Sequence[torch.Generator]) -> Sequence[Tensor]:
    """Put random columns in place of those that are not held: orthonormal, also to the others; held ones come first.

    bases: U_BMK of different M, orthonormal columns and, where they are not held, zero. generators: of each matrix.
    """
    K = held_BK.shape[1]
    assert all(U_BMK.shape[1] >= K for U_BMK in bases), [U_BMK.shape for U_BMK in bases]
    held = [held_BK] * len(bases)
    # again: where K is nearly M, a random column may lie almost within the others
    while (missing := K - torch.stack(held).sum(dim=2)).any():
        sides = []
        for U_BMK, of_side in zip(bases, missing.tolist(), strict=True):
            X_BMK = torch.zeros_like(U_BMK)
            for X_MK, generator, count in zip(X_BMK, generators, of_side, strict=True):
                if count:
                    X_MK[:, :count] = torch.randn(len(X_MK), count, generator=generator, device=generator.device)
            sides.append((X_BMK, U_BMK))
        splits = _splits(*sides)
        bases = []
        for at, split in enumerate(splits):
            is_there_BL = torch.cat([held[at], split.held_BK], dim=1)
            first_BK = is_there_BL.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :K]
            chosen_BLK = torch.nn.functional.one_hot(first_BK, 2 * K).mT.to(split.mix_BLK.dtype)
            held[at] = is_there_BL.gather(1, first_BK)
            bases.append(split.combine(chosen_BLK))
    return bases


@dataclass(frozen=True)
class _Split:
    """X_BMK = P C + W R, with the columns of [P, W] orthonormal or, where X has no more directions, zero.

    W = [P, rough] @ mix is never formed by itself.
    """

    P_BMI: Tensor
    rough_BMK: Tensor
    """W as the first round of orthonormalization left it."""
    mix_BLK: Tensor
    C_BIK: Tensor
    R_BKK: Tensor
    held_BK: Tensor
    """Which columns W has."""

    def combine(self, weights_BLJ: Tensor) -> Tensor:
        """[P, W] @ weights."""
        inside = self.P_BMI.shape[2]
        on_both = self.mix_BLK @ weights_BLJ[..., inside:, :]
        on_both[:, :inside] += weights_BLJ[..., :inside, :]
        on_P, on_rough = on_both.float().split([inside, on_both.shape[1] - inside], dim=1)
        return torch.baddbmm(self.P_BMI @ on_P, self.rough_BMK, on_rough)


def _splits(*sides: tuple[Tensor, Tensor]) -> list[_Split]:
    """Split X_BMK by P_BMI for each of the sides, which share I and K: all their small matrices are one batch.

    Two rounds of projection and Cholesky-QR, the first by way of eigenvectors, which reveal the rank. Directions of X
    beyond P that are small against X are dropped. Small matrices are float64.
    """
    inside_BIK = [P_BMI.mT @ X_BMK for X_BMK, P_BMI in sides]
    rests = [torch.baddbmm(X, P, C, alpha=-1) for (X, P), C in zip(sides, inside_BIK, strict=True)]
    energy_BK, E_BKK = torch.linalg.eigh(torch.cat([_grams(rest_BMK) for rest_BMK in rests]))
    norms = [torch.linalg.vector_norm(X_BMK, dim=(1, 2), dtype=torch.float64) for X_BMK, _ in sides]  # squares overflow
    norm_B = torch.cat(norms)
    held_BK = energy_BK > (_DROP * norm_B).square()[:, None]
    root_BK = torch.where(held_BK, energy_BK, 0).sqrt()
    shrunk_BKK = (E_BKK * torch.where(held_BK, root_BK.reciprocal(), 0)[:, None]).float()
    roughs = [rest @ shrunk for rest, shrunk in zip(rests, shrunk_BKK.chunk(len(sides)), strict=True)]
    del rests
    # rounding has left the weakest directions with parts of P and of each other, some percent at most
    D_BIK = torch.cat([P.mT @ rough for (_, P), rough in zip(sides, roughs, strict=True)]).double()
    overlap_BKK = torch.cat([rough.mT @ rough for rough in roughs]).double() - D_BIK.mT @ D_BIK
    overlap_BKK.diagonal(dim1=1, dim2=2).add_(~held_BK)
    L_BKK = torch.linalg.cholesky(overlap_BKK)
    unmixed_BLK = torch.cat([-D_BIK, held_BK.double().diag_embed()], dim=1)
    mix_BLK = torch.linalg.solve_triangular(L_BKK.mT, unmixed_BLK, upper=True, left=False)
    R_BKK = root_BK[:, :, None] * E_BKK.mT
    C_BIK = torch.cat(inside_BIK).double() + D_BIK @ R_BKK
    small = zip(*(each.chunk(len(sides)) for each in (mix_BLK, C_BIK, L_BKK.mT @ R_BKK, held_BK)), strict=True)
    return [_Split(P, rough, *of_side) for (_, P), rough, of_side in zip(sides, roughs, small, strict=True)]


def _block_matrices(top_left: Tensor, top_right: Tensor, bottom_left: Tensor) -> Tensor:
    """[[a, b], [c, 0]]."""
    zero = torch.zeros_like(top_left)
    return torch.cat([torch.cat([top_left, top_right], dim=2), torch.cat([bottom_left, zero], dim=2)], dim=1)


def _grams(X_BMK: Tensor) -> Tensor:
    """X^T X in float64."""
    B, _, K = X_BMK.shape
    gram_BKK = torch.zeros(B, K, K, dtype=torch.float64, device=X_BMK.device)
    for rows_BTK in X_BMK.split(max(_BLOCK_ROWS // B, _LEAST_BLOCK_ROWS), dim=1):
        rows_BTK = rows_BTK.double()
        gram_BKK.baddbmm_(rows_BTK.mT, rows_BTK)
    return gram_BKK
