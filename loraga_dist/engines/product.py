"""Products over tokens, summed in float32 whatever the dtype of the data."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


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


def thin_product(left_TN: Tensor, right_NS: Tensor) -> Tensor:
    """left @ right of a float32 right, in the dtype of left where that is faster and in range."""
    fast = left_TN.dtype == torch.bfloat16 and (left_TN.is_cuda or multiplies_bfloat16())
    return left_TN @ right_NS.to(left_TN.dtype) if fast else left_TN.float() @ right_NS


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has units for it; without them it is many times slower than float32."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
