"""A0 and B0 of one target, from its gradient or its weight."""

from __future__ import annotations

from typing import Any

import torch

from loraga_dist.config import SchemeConfig
from loraga_dist.engines.base import seeded_generator
from loraga_dist.linalg import TruncatedSVD, truncated_svd
from loraga_dist.model.targets import Target
from loraga_dist.schemes import SCHEMES, LoraFactors, SchemeInputs


def make_factors(
    target: Target, svd: TruncatedSVD, config: SchemeConfig, dtype: torch.dtype, weight_S_R: torch.Tensor | None
) -> LoraFactors:
    """A0, B0 from one target's gradient, rounded to `dtype` and stored in float32; the same wherever and whenever they
    are made.

    weight_S_R: `weight_singular_values`, for the scale that wants them.
    """
    generator = seeded_generator(config.seed, f"{target.name}/direction", torch.device("cpu"))
    inputs = scheme_inputs(target, config, generator, svd=svd, weight_S_K=weight_S_R)
    return _rounded(SCHEMES[config.scheme].factors(inputs), dtype)


def scheme_inputs(target: Target, config: SchemeConfig, generator: torch.Generator, **source: Any) -> SchemeInputs:
    """Of one target. source: what the scheme starts from, by `SchemeInputs`' names."""
    return SchemeInputs(
        M=target.M,
        N=target.N,
        r=target.r,
        scaling=target.scaling,
        direction=config.direction,
        scale=config.scale,
        stable_gamma=config.gamma,
        generator=generator,
        **source,
    )


def _rounded(factors: LoraFactors, dtype: torch.dtype) -> LoraFactors:
    return LoraFactors(A_RN=factors.A_RN.to(dtype).float(), B_MR=factors.B_MR.to(dtype).float())


def weight_singular_values(W: torch.Tensor, target: Target, config: SchemeConfig) -> torch.Tensor:
    """Leading r singular values of a target's weight as the model holds it, float32 on the host."""
    generator = seeded_generator(config.seed, f"{target.name}/weight", W.device)
    return truncated_svd(W.float(), rank=target.r, oversampling=target.r, generator=generator).S_K.cpu()


def product_norm(factors: LoraFactors) -> float:
    """||B A||_F from the r x r Gram matrices."""
    A, B = factors.A_RN.double(), factors.B_MR.double()
    return ((B.t() @ B) * (A @ A.t())).sum().clamp_min(0).sqrt().item()
