"""Arithmetic on a rank's flat slice of a row-major matrix: nothing here gathers anything."""

from __future__ import annotations

import torch
from torch.nn import Parameter

from loraga_dist.model.targets import Target

BLOCK_ELEMENTS = 1 << 22
"""Elements in a wider dtype at a time: 16 MiB in float32."""


def flat_range(numel: int, shard_numel: int, shard_index: int) -> tuple[int, int]:
    """Elements [start, end) of a flattened parameter that one of its equal shards holds; the last ones are padded."""
    start = min(shard_numel * shard_index, numel)
    return start, min(start + shard_numel, numel)


def part_of(shard: torch.Tensor, start: int, target: Target) -> tuple[torch.Tensor, int]:
    """What a slice of a flattened parameter, which begins at `start`, has of a target's matrix in it: a view, and the
    position in the matrix of its first element."""
    first, past = target.first_element, target.first_element + target.M * target.N
    begin, end = max(start, first), min(start + shard.numel(), past)
    return (shard[begin - start : end - start], begin - first) if begin < end else (shard[:0], 0)


def elements_of(parameter: Parameter) -> torch.Tensor:
    """The flattened elements of a parameter that this process holds whole, as a writable view."""
    if not parameter.is_contiguous():
        parameter.data = parameter.data.contiguous()
    return parameter.data.view(-1)


@torch.no_grad()
def subtract_lowrank_(
    shard: torch.Tensor, start: int, target: Target, A_RN: torch.Tensor, B_MR: torch.Tensor, scaling: float
) -> None:
    """W_MN -= scaling * B A on the elements of flattened W that `shard` (1-D) holds, `start` being the first.

    The product and the difference are float32, rounded once to the shard's dtype. Slices may start and end mid-row.
    """
    # Conv1D stores W transposed, hence (B A)^T = A^T B^T
    left_PR, right_RQ = (A_RN.t(), B_MR.t()) if target.transposed else (B_MR, A_RN)
    Q = right_RQ.shape[1]
    end = start + shard.numel()
    rows_per_block = max(1, BLOCK_ELEMENTS // Q)
    right = right_RQ.float()
    row, last_row = start // Q, -(-end // Q)
    while row < last_row:
        next_row = min(row + rows_per_block, last_row)
        first, past = max(start, row * Q), min(end, next_row * Q)
        delta = (left_PR[row:next_row].float() @ right).flatten()[first - row * Q : past - row * Q]
        part = shard[first - start : past - start]
        # an offloaded shard lies on the host: the arithmetic stays where the factors are
        part.copy_(part.to(delta.device, torch.float32).sub_(delta, alpha=scaling))
        row = next_row


def square_norm(shard: torch.Tensor) -> torch.Tensor:
    """Sum of squares in float64. By blocks, because on a CPU each is first copied to float64."""
    blocks = shard.split(BLOCK_ELEMENTS)  # one at least, be it empty
    return torch.stack([torch.linalg.vector_norm(block, dtype=torch.float64).square() for block in blocks]).sum()
