"""White inputs, for schemes that ask how a layer's outputs move instead of its weight: what stands before the engines.

An engine that is shown x~ = W x accumulates G W^T; its triplets U S V^T make U S (V^T W) a truncation of G W^T W, the
coefficient of the regression of dy on x in the metric of its second moment C, as W^T W is the inverse of C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loraga_dist.engines.base import Collectives, Entries, GradientSVD, Matrix, Tensors, naming, seeded_generator
from loraga_dist.linalg import Moments, Whitening


class InputMoments:
    """The second moments of the inputs of some matrices; of neighbours that are given one input, once."""

    def __init__(self, matrices: Sequence[Matrix], *, seed: int, device: torch.device) -> None:
        self._matrices = {matrix.name: matrix for matrix in matrices}
        self._seed = seed
        self._device = device
        self._leader_of: dict[str, str] = {}
        self._sums: dict[str, Moments] = {}
        self._last: tuple[Tensor, str] | None = None

    def observe(self, name: str, x: Tensor, counts: Tensor | None) -> None:
        """Add the input of a matrix: x (..., N). counts: which of its tokens do, bool; None for all."""
        if name not in self._leader_of:
            shared = self._last is not None and _is_same(x, self._last[0])
            self._leader_of[name] = leader = self._last[1] if shared and self._last else name
            if leader == name:
                self._sums[name] = self._zeros(self._matrices[name])
        leader = self._leader_of[name]
        self._last = x, leader
        if leader == name:
            self._sums[name].add_(x.flatten(0, -2) if counts is None else x[counts.to(x.device)])

    def end_microbatch(self) -> None:
        self._last = None

    def whitenings(self, damping: float, world: Collectives) -> dict[str, Whitening]:
        """By matrix, from all ranks' inputs; a collective. Every owner finds those of its matrices."""
        found: dict[str, Whitening] = {}
        for name, sums in self._sums.items():
            matrix = self._matrices[name]
            for tensor in sums.tensors:
                # what is not finite is found where it shows in a gradient, which can name its layer
                world.reduce_(tensor.nan_to_num_(posinf=0, neginf=0), matrix.owner)
            if world.rank == matrix.owner:
                with naming(matrix):
                    found[name] = Whitening.of(sums, damping)
            else:
                found[name] = _empty(matrix, self._device)
        for name, whitening in found.items():
            for tensor in _tensors(whitening).values():
                world.broadcast_(tensor, self._matrices[name].owner)
        return {name: found[leader] for name, leader in self._leader_of.items()}

    def _zeros(self, matrix: Matrix) -> Moments:
        assert matrix.input_width is not None
        generator = seeded_generator(self._seed, f"{matrix.name}/inputs", torch.device("cpu"))
        return Moments.zeros(matrix.N, matrix.input_width, generator, self._device)


class Whites:
    """The whitening of every matrix's input, once it is known; of matrices whose inputs stay as they are, none."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self._matrices = {matrix.name: matrix for matrix in matrices if matrix.input_width is not None}
        self._of: dict[str, Whitening] = {}
        self._last: tuple[Whitening, Tensor, Tensor] | None = None

    @property
    def known(self) -> bool:
        return len(self._of) == len(self._matrices)

    def moments(self, *, seed: int, device: torch.device) -> InputMoments:
        """What is to be shown the inputs, for `become`."""
        return InputMoments(list(self._matrices.values()), seed=seed, device=device)

    def become(self, found: Mapping[str, Whitening]) -> None:
        self._of = dict(found)
        assert self.known

    def of(self, name: str, x_TN: Tensor) -> Tensor:
        """x~, or x where it is to stay as it is; made once for neighbours that are given one input."""
        if name not in self._matrices:
            return x_TN
        whitening = self._of[name]
        if self._last is None or self._last[0] is not whitening or not _is_same(x_TN, self._last[1]):
            self._last = whitening, x_TN, whitening.rows(x_TN)
        return self._last[2]

    def forget(self) -> None:
        """Let go of the last input."""
        self._last = None

    def undo(self, name: str, found: GradientSVD) -> GradientSVD:
        """What was found for x~, for x."""
        if name not in self._matrices:
            return found
        whitening, svd = self._of[name], found.svd
        rows_KN = whitening.transposed(svd.Vh_KN).contiguous()
        return replace(found, svd=replace(svd, Vh_KN=rows_KN), input_rank=float(whitening.effective_rank))

    def state(self, rank: int) -> dict[str, Tensor]:
        """Of the matrices this rank owns, on the host."""
        return {
            f"{name}/{part}": tensor.cpu()
            for name, whitening in self._of.items()
            if self._matrices[name].owner == rank
            for part, tensor in _tensors(whitening).items()
        }

    def load_state(self, tensors: Tensors, world: Collectives, device: torch.device) -> None:
        """A collective."""
        for name, matrix in self._matrices.items():
            whitening = _empty(matrix, device)
            for part, tensor in _tensors(whitening).items():
                if world.rank == matrix.owner:
                    tensor.copy_(tensors[f"{name}/{part}"])
                world.broadcast_(tensor, matrix.owner)
            self._of[name] = whitening

    @staticmethod
    def entries(matrix: Matrix) -> Entries:
        """Of a saved state, by what follows the name."""
        whitening = _empty(matrix, torch.device("meta"))
        return {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in _tensors(whitening).items()}


def _empty(matrix: Matrix, device: torch.device) -> Whitening:
    assert matrix.input_width is not None
    N, K = matrix.N, matrix.input_width
    return Whitening(
        scale_N=torch.empty(N, device=device),
        Q_NK=torch.empty(N, K, device=device),
        F_K=torch.empty(K, device=device),
        effective_rank=torch.empty((), dtype=torch.float64, device=device),
    )


def _tensors(whitening: Whitening) -> dict[str, Tensor]:
    return {
        "white_scale": whitening.scale_N,
        "white_Q": whitening.Q_NK,
        "white_F": whitening.F_K,
        "white_rank": whitening.effective_rank,
    }


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, both alive, are the same memory."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
