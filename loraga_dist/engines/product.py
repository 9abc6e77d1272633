"""Products over tokens, summed in float32 whatever the dtype of the data."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_BLOCK = 1024
"""Columns of a square at a time: of two blocks of it on both sides of the diagonal, one is left out."""


def add_product_(sum_MN: Tensor, left_TM: Tensor, right_TN: Tensor) -> None:
    """Add left^T right to a float32 sum."""
    if left_TM.dtype == right_TN.dtype and left_TM.itemsize == 2 and left_TM.is_cuda:
        # products of 16 bits are exact in float32, which such a device can sum in and hand over
        sum_MN.add_(torch.mm(left_TM.t(), right_TN, out_dtype=torch.float32))
    elif left_TM.dtype == right_TN.dtype == torch.bfloat16 and left_TM.device.type == "cpu" and multiplies_bfloat16():
        # sums in float32, too, but hands over each product rounded to the precision of the data
        sum_MN.add_(left_TM.t() @ right_TN)
    else:
        sum_MN.addmm_(left_TM.float().t(), right_TN.float())


def dtype_of_products(dtype: torch.dtype) -> torch.dtype:
    """What products of such data are handed over in, where these are multiplied again: float16 has not the range."""
    return torch.float32 if dtype == torch.float16 else dtype


def rows_with_gradient(x_TN: Tensor, dy_TM: Tensor) -> Tensor:
    """Which rows add to dy^T x, whichever side has the gradient: padding and what no loss depends on do not."""
    return _nonzero_rows(x_TN) & _nonzero_rows(dy_TM)


def _nonzero_rows(rows: Tensor) -> Tensor:
    return (rows.amax(dim=1) != 0) | (rows.amin(dim=1) != 0)  # ten times faster than `any` on CPUs


def add_square_(sum_NN: Tensor, x_TN: Tensor) -> None:
    """Add x^T x to the lower triangle of a float32 sum; what is above it is for `mirror_lower_`."""
    for first in range(0, len(sum_NN), _BLOCK):
        add_product_(sum_NN[first:, first : first + _BLOCK], x_TN[:, first:], x_TN[:, first : first + _BLOCK])


def square_bytes(num_tokens: int, N: int) -> int:
    """What `add_square_` takes beside its arguments: float32 copies of them, or a product."""
    block = min(N, _BLOCK)
    return 4 * max(num_tokens * (N + block), N * block)


def mirror_lower_(sum_NN: Tensor) -> None:
    """Make a sum of squares symmetric."""
    for end in range(_BLOCK, len(sum_NN), _BLOCK):
        sum_NN[end - _BLOCK : end, end:] = sum_NN[end:, end - _BLOCK : end].T


def thin_product(left_TN: Tensor, right_NS: Tensor) -> Tensor:
    """left @ right of a float32 right, in the dtype of left where that is faster and in range."""
    fast = left_TN.dtype == torch.bfloat16 and (left_TN.is_cuda or multiplies_bfloat16())
    return left_TN @ right_NS.to(left_TN.dtype) if fast else left_TN.float() @ right_NS


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has units for it; without them it is many times slower than float32."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
