"""Second moments of what goes into layers, for schemes that ask how a layer's outputs move instead of its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loraga_dist.engines.base import (
    Collectives,
    EngineState,
    Entries,
    GradientSVD,
    Matrix,
    Tensors,
    gather_on_owner_,
    naming,
    require_entries,
)
from loraga_dist.engines.home import StateHome
from loraga_dist.engines.product import add_square_, mirror_lower_, rows_with_gradient
from loraga_dist.linalg import DampedMoment, effective_rank, regression


class Inputs:
    """Sums over tokens of x x^T, or of its diagonal, of the inputs of some matrices; what the gradient's triplets are
    made into by them. Neighbours that are given one input share its sum; a routed matrix has its own."""

    def __init__(self, matrices: Sequence[Matrix], home: StateHome) -> None:
        self._matrices = {matrix.name: matrix for matrix in matrices if matrix.moment_shape is not None}
        self._home = home
        self._leader_of: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._num_tokens: dict[str, Tensor] = {}
        self._rows: dict[int, Tensor] = {}
        self._is_copy = False
        self._last: tuple[Tensor, str] | None = None
        self._damped: tuple[str, DampedMoment] | None = None
        for name, matrix in self._matrices.items():
            if matrix.is_routed:  # what a rank was shown must not decide whose its sum is
                self._lead(name, name)

    @classmethod
    def none(cls) -> Inputs:
        """Of no matrix: what is seen is let go, and gradients stay gradients."""
        return cls((), StateHome(torch.device("cpu")))

    @property
    def are_wanted(self) -> bool:
        return bool(self._matrices)

    def begin_microbatch(self, rows: Mapping[int, Tensor], *, is_copy: bool) -> None:
        """rows: which rows count, by how many there are; of an input of another number those with a gradient, none of a
        copy."""
        self._rows = {count: chosen.to(self._home.device) for count, chosen in rows.items()}
        self._is_copy, self._last = is_copy, None

    def observe(self, name: str, x_TN: Tensor, dy_TM: Tensor) -> None:
        if name not in self._matrices:
            return
        if self._matrices[name].is_routed:
            if not self._is_copy:
                self._add_with_gradient(name, x_TN, dy_TM)  # padding is routed, too
            return
        if name not in self._leader_of:
            leader = self._last[1] if self._last is not None and _is_same(x_TN, self._last[0]) else name
            self._lead(leader, name)
        leader = self._leader_of[name]
        self._last = x_TN, leader
        if leader != name or self._is_copy:
            return
        if len(x_TN) in self._rows:
            x_TN = x_TN.index_select(0, self._rows[len(x_TN)])
            self._add(name, x_TN, len(x_TN))
        else:  # of an output head, a part of a long sequence
            self._add_with_gradient(name, x_TN, dy_TM)

    def _add_with_gradient(self, name: str, x_TN: Tensor, dy_TM: Tensor) -> None:
        counts_T = rows_with_gradient(x_TN, dy_TM)
        self._add(name, x_TN * counts_T[:, None], counts_T.sum())

    def _add(self, name: str, x_TN: Tensor, num_tokens: int | Tensor) -> None:
        kept = self._sums[name]
        sums = self._home.fetch(kept)
        if sums.dim() == 2:
            add_square_(sums, x_TN)  # what rounding makes negative of it, damping outweighs
        else:
            sums.add_(x_TN.float().square().sum(dim=0))
        self._home.put_back(kept, sums)
        self._num_tokens[name] += num_tokens

    def end_microbatch(self) -> None:
        self._last = None

    def save_state(self, world: Collectives) -> EngineState:
        """As `GradientEngine.save_state`."""
        tensors = {}
        for name, kept in self._sums.items():
            for part, tensor in (("moment", kept), ("moment_tokens", self._num_tokens[name])):
                sums = self._home.fetch(tensor)
                is_owner = gather_on_owner_(sums, self._matrices[name].owner, world)
                self._home.put_back(tensor, sums)
                if is_owner:
                    tensors[f"{name}/{part}"] = sums.cpu()
        return EngineState({"leader_of": self._leader_of}, tensors)

    def load_state(self, content: dict[str, Any], tensors: Tensors, world: Collectives) -> None:
        for name, leader in content["leader_of"].items():
            self._lead(leader, name)
        for name, kept in self._sums.items():
            if self._matrices[name].owner == world.rank:
                self._home.put_back(kept, tensors[f"{name}/moment"].to(self._home.device))
                self._num_tokens[name].copy_(tensors[f"{name}/moment_tokens"])

    @staticmethod
    def check_state(matrix: Matrix, content: dict[str, Any], saved: Entries) -> None:
        """As `GradientEngine.check_state`."""
        leader = content["leader_of"].get(matrix.name)
        if not isinstance(leader, str | None):
            raise ValueError(f"the input of {matrix.name} is that of {leader}")
        if leader == matrix.name and matrix.moment_shape is not None:
            entries = {"moment": (torch.float32, matrix.moment_shape), "moment_tokens": (torch.float64, ())}
            require_entries(saved, entries)

    def collect(self, world: Collectives) -> None:
        """Sum over ranks; a collective. Whoever owns a matrix needs the moment of its input."""
        for name, kept in self._sums.items():
            sums = world.sum_(self._home.fetch(kept)).div_(world.sum_(self._num_tokens[name]).clamp(min=1))
            if sums.dim() == 2:
                mirror_lower_(sums)
            self._home.put_back(kept, sums)

    def regress(self, name: str, found: GradientSVD, damping: float) -> GradientSVD:
        """What was found of a gradient, as a regression on its input; of a matrix whose input was asked for."""
        matrix = self._matrices.get(name)
        if matrix is None:
            return found
        damped = self._damped_moment(self._leader_of[name], damping)
        with naming(matrix):
            # the others are a by-product, which rounding changes
            svd = regression(found.svd.leading(matrix.num_triplets), damped)
        return replace(found, svd=svd, input_rank=effective_rank(damped.moment))

    def _damped_moment(self, leader: str, damping: float) -> DampedMoment:
        """That of the last call if it is of the same input, with its factor."""
        if self._damped is None or self._damped[0] != leader:
            self._damped = leader, DampedMoment(self._home.fetch(self._sums[leader]), damping)
        return self._damped[1]

    def forget(self) -> None:
        """Let go of all sums, when all regressions are made."""
        self._sums, self._last, self._damped = {}, None, None

    def _lead(self, leader: str, name: str) -> None:
        self._leader_of[name] = leader
        if leader == name:
            shape, device = self._matrices[name].moment_shape, self._home.device
            assert shape is not None
            self._sums[name] = self._home.keep(torch.zeros(shape, device=device))
            self._num_tokens[name] = torch.zeros((), dtype=torch.float64, device=device)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, both alive, are the same memory."""
    return (
        one.numel() > 0
        and one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )
