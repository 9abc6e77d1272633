"""A0 and B0 of one target, from its gradient, its weight, or neither."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loraga_dist.config import SchemeConfig
from loraga_dist.engines.base import seeded_generator
from loraga_dist.errors import RunError
from loraga_dist.linalg import TruncatedSVD, truncated_svd
from loraga_dist.model.targets import Target
from loraga_dist.schemes import SCALES, SCHEMES, LoraFactors, SchemeInputs


def needs_weight(config: SchemeConfig) -> bool:
    """Tell whether `make_factors` wants the target's weight."""
    return SCHEMES[config.scheme].source == "weight" or SCALES[config.scale].needs_weight


def make_factors(
    target: Target, config: SchemeConfig, dtype: torch.dtype, *, svd: TruncatedSVD | None, weight: torch.Tensor | None
) -> LoraFactors:
    """Make A0 and B0 of a target: rounded to `dtype`, float32 on the host, the same wherever they are made.

    svd: of its gradient, for schemes that take one. weight: as the model holds it, where `needs_weight`; on its device
    the scheme factorizes it. Raises RunError for a weight that is not finite.
    """
    if weight is not None and not torch.stack(weight.aminmax()).isfinite().all():
        raise RunError(f"factorize: the weight of {target.name} holds a NaN or an infinity")
    scheme, W_MN, weight_S_R = SCHEMES[config.scheme], None, None
    if scheme.source == "gradient":
        generator = seeded_generator(config.seed, f"{target.name}/direction", torch.device("cpu"))
        if weight is not None:
            weight_S_R = _singular_values(weight, target, config)
    else:
        device = torch.device("cpu") if weight is None else weight.device
        generator = seeded_generator(config.seed, f"{target.name}/weight", device)
        W_MN = weight.t() if weight is not None and target.transposed else weight
    made = scheme.factors(
        SchemeInputs(
            M=target.M,
            N=target.N,
            r=target.r,
            scaling=target.scaling,
            direction=config.direction,
            scale=config.scale,
            stable_gamma=config.gamma,
            step=1.0 if config.step is None else config.step,
            generator=generator,
            svd=svd,
            weight_S_K=weight_S_R,
            W_MN=W_MN,
        )
    )
    return LoraFactors(A_RN=made.A_RN.cpu().to(dtype).float(), B_MR=made.B_MR.cpu().to(dtype).float())


def _singular_values(weight: torch.Tensor, target: Target, config: SchemeConfig) -> torch.Tensor:
    """The leading r, float32 on the host."""
    generator = seeded_generator(config.seed, f"{target.name}/weight", weight.device)
    return truncated_svd(weight.float(), rank=target.r, oversampling=target.r, generator=generator).S_K.cpu()


def join(members: Sequence[LoraFactors]) -> LoraFactors:
    """A and B of one of PEFT's layers, from those of its E matrices: (E R, N), each one's rows together, and (M, R E),
    the columns of one component together.

    Source: PEFT's ParamWrapper, `get_delta_weight`.
    """
    return LoraFactors(
        A_RN=torch.cat([factors.A_RN for factors in members]),
        B_MR=torch.stack([factors.B_MR for factors in members], dim=-1).flatten(1),
    )


def split(layer: LoraFactors, size: int) -> list[LoraFactors]:
    """What `join` was given; views. size: E."""
    B_EMR = layer.B_MR.unflatten(1, (-1, size)).permute(2, 0, 1)
    return [LoraFactors(A_RN=A_RN, B_MR=B_MR) for A_RN, B_MR in zip(layer.A_RN.chunk(size), B_EMR, strict=True)]


def product_norm(factors: LoraFactors) -> float:
    """||B A||_F from the r x r Gram matrices."""
    A, B = factors.A_RN.double(), factors.B_MR.double()
    return ((B.t() @ B) * (A @ A.t())).sum().clamp_min(0).sqrt().item()
