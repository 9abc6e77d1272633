"""How fast this machine's processors multiply what a model multiplies, by a short measured product."""

from __future__ import annotations

import os
import time

import torch

from loraga_dist.model.targets import Target

_SECONDS = 0.3
_MOST_TOKENS = 2048
"""Of the product; more are not faster."""


def measured_tflops(target: Target, num_tokens: int, dtype: torch.dtype, ranks: int) -> float:
    """Measure x W^T of a target's shape in `dtype`; 10^12 flops a second of each of so many ranks on this machine."""
    x_TN = torch.randn(min(num_tokens, _MOST_TOKENS), target.N).to(dtype)
    W_MN = torch.randn(target.M, target.N).to(dtype)
    torch.mm(x_TN, W_MN.t())  # the first takes its kernel from disk
    started, products = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < _SECONDS:
        torch.mm(x_TN, W_MN.t())
        products += 1
    # other ranks will want the processors that this product had to itself
    share = min(1.0, len(os.sched_getaffinity(0)) / (ranks * torch.get_num_threads()))
    return share * products * 2 * x_TN.shape[0] * target.M * target.N / seconds / 1e12
