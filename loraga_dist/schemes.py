"""The first A and B of a LoRA adapter: from a gradient's singular triplets, from the weight itself, or from neither."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from loraga_dist.linalg import TruncatedSVD, numerical_rank, thin_qr, truncated_svd, truncated_svd_bytes


class LoraFactors(NamedTuple):
    """The adapter's first factors, fp32, contiguous; the layer adds scaling * B_MR @ A_RN to its weight."""

    A_RN: Tensor
    B_MR: Tensor


@dataclass(frozen=True, kw_only=True)
class SchemeInputs:
    """What a scheme may depend on, of one target; `direction`, `scale` and `stable_gamma` as in the configuration."""

    M: int
    N: int
    r: int
    scaling: float
    direction: str
    scale: str
    stable_gamma: float
    step: float = 1.0
    """Length of B, of schemes that take a step."""
    generator: torch.Generator
    """Depends on the seed and the target alone; on the device of what is factorized, else on the CPU."""
    svd: TruncatedSVD | None = None
    """Of the gradient, for the schemes that take one."""
    weight_S_K: Tensor | None = None
    """At least r leading singular values of the weight, for the scale weight_svd."""
    W_MN: Tensor | None = None
    """The weight, in any floating dtype, for the schemes that factorize it; never changed."""


Indices = tuple[Tensor, Tensor]
Multipliers = tuple[Tensor | float, Tensor | float]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the rows of A and the columns of B are multiplied by, and what follows from that."""

    multipliers: Callable[[SchemeInputs, Tensor], Multipliers]
    """Of A and B, from the scheme's inputs and S_B_R: singular values of the triplets that B takes its columns from."""
    smaller_offset: str
    """What to change where s B0 A0 outweighs W."""
    needs_weight: bool = False
    """`SchemeInputs.weight_S_K` must be there."""
    workspace_bytes: Callable[[int, int, int], int] = lambda M, N, r: 0
    """Taken for that, beside the weight as the model holds it."""


@dataclass(frozen=True, kw_only=True)
class BestRate:
    """The learning rate that trained best in docs/BENCHMARKS.md, on the lower of its two tasks, at the scheme's own
    gamma."""

    times_full: float
    """Over the best one of full fine-tuning."""
    scaling: float
    """s there."""


MEASURED_SCALE = "stable"
"""Of SCALES, the one that the rates were measured at."""

FULL_RATE = 1e-4
"""What stands for full fine-tuning's learning rate where nobody has tuned it."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to initialise: its function, what that needs, and what follows from it."""

    title: str
    source: Literal["gradient", "weight", "nothing"]
    """What it starts from. Of a gradient the output holds the triplets, too, in `factors`."""
    factors: Callable[[SchemeInputs], LoraFactors]
    num_triplets: Callable[[int], int]
    """Singular directions that a matrix must have for rank r; of the gradient, that many are computed."""
    changes_base: bool
    """W becomes W - s B0 A0, and the adapter belongs on that: the output has an offset and a residual base. Else it
    belongs on the original model."""
    starts_at_model: bool
    """The first forward pass is the original model's."""
    missing_directions: str = ""
    """What becomes of directions that are asked for and that a gradient of low rank does not have."""
    whitens: bool = False
    """Takes the gradient for white inputs, as `init.whitening` says: what a start does to the layer's outputs, on the
    data."""
    takes_step: bool = False
    """B0 is a step of `init.step`, whose length is searched on samples kept apart where it is null."""
    init_keys: tuple[str, ...] = ()
    """Keys of the section `init` that concern some schemes only, and this one."""
    stable_gamma: float = 1.0
    """Where `init.stable_gamma` is null."""
    smaller_offset: str = "lower lora.lora_alpha"
    """What to change where s B0 A0 outweighs W, unless the scale says it."""
    best_rate: BestRate | None = None
    """None where none was measured."""
    workspace_bytes: Callable[[int, int, int], int] = lambda M, N, r: 0
    """Taken by the factorization of a weight, beside the weight as the model holds it."""
    factorization_cost: Callable[[int, int, int], int] = lambda M, N, r: M * N * r
    """Grows as the flops of that factorization do; owners are balanced by it."""

    def smaller_offset_at(self, scale: str) -> str:
        """What to change where s B0 A0 outweighs W. scale: a key of SCALES."""
        return SCALES[scale].smaller_offset if "scale" in self.init_keys else self.smaller_offset


def times_full_rate(scheme: Scheme, scale: str, gamma: float, scaling: float) -> float | None:
    """What full fine-tuning's learning rate is multiplied by for a first try; None where nothing was measured.

    It goes as sqrt(gamma) / s: in docs/BENCHMARKS.md a fourfold gamma doubled LoRA-GA's best rate, and a 2.8-fold s
    halved plain LoRA's, so that this errs to the low side.
    """
    best = scheme.best_rate
    if best is None or ("scale" in scheme.init_keys and scale != MEASURED_SCALE):
        return None
    return best.times_full * math.sqrt(gamma / scheme.stable_gamma) * best.scaling / scaling


KAIMING_ROW_NORM = 1 / math.sqrt(3)
"""Of the rows of plain LoRA's A, in the mean square."""


def lora_scaling(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """PEFT's factor in front of B A: lora_alpha / r, or lora_alpha / sqrt(r) with rank-stabilised LoRA."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def lora_ga(inputs: SchemeInputs) -> LoraFactors:
    """LoRA-GA: A and B share out the 2r leading singular directions of the gradient G ~ U S V^T.

    `direction` (a key of DIRECTIONS) says which right vectors become rows of A and which left ones columns of B,
    `scale` (a key of SCALES) by what they are multiplied. `weight_S_K` is needed by the scale weight_svd alone;
    `generator` is drawn from by the direction random alone.

    Where G has fewer than 2r singular values above rounding, the columns of B that would be noise are zero, so that
    these components start as in plain LoRA. Rows of A stay orthogonal and of one norm.

    Source: arXiv 2407.05000, section 3, and the official code github.com/Outsider565/LoRA-GA.
    """
    r, svd = inputs.r, inputs.svd
    assert svd is not None and 2 * r <= svd.width, "LoRA-GA needs 2r triplets of the gradient"
    chosen = DIRECTIONS[inputs.direction](r, inputs.generator)
    index_A_R, index_B_R = (index.to(svd.S_K.device) for index in chosen)
    times_A, times_B = SCALES[inputs.scale].multipliers(inputs, svd.S_K[index_B_R])
    above_rounding_R = index_B_R < numerical_rank(svd.S_K, inputs.M, inputs.N)
    return LoraFactors(
        A_RN=(svd.Vh_KN[index_A_R] * times_A).contiguous(),
        B_MR=(svd.U_MK[:, index_B_R] * (times_B * above_rounding_R)).contiguous(),
    )


def lora_one(inputs: SchemeInputs) -> LoraFactors:
    """LoRA-One: B0 A0 is a step against the gradient's best rank-r approximation, on an unchanged base.

    With -G ~ U S V^T: B = U_r sqrt(S_r / S_1) / sqrt(gamma), A = sqrt(S_r / S_1) V_r^T / sqrt(gamma). B A is not zero,
    so the start is not the pretrained model but some way down its loss.

    Source: the official code github.com/YuanheZ/LoRA-One, run_exp.py (arXiv 2502.01235).
    """
    r, svd = inputs.r, inputs.svd
    assert svd is not None and r <= svd.width, "LoRA-One needs r triplets of the gradient"
    tiny = torch.finfo(torch.float32).tiny
    root_R = (svd.S_K[:r] / svd.S_K[0].clamp_min(tiny)).sqrt() / math.sqrt(inputs.stable_gamma)
    # without any gradient A is what of rank one it would be, or neither factor would learn
    of_A_R = torch.where(svd.S_K[0] > tiny, root_R, 1 / math.sqrt(inputs.stable_gamma))
    return LoraFactors(
        A_RN=(of_A_R[:, None] * svd.Vh_KN[:r]).contiguous(),
        B_MR=(-svd.U_MK[:, :r] * root_R).contiguous(),
    )


def rrr(inputs: SchemeInputs) -> LoraFactors:
    """Reduced-rank regression: A0 spans the inputs that predict the loss gradient at the output best; B0 is zero.

    Of all maps B A of rank r from x, the least squares one to dy has as rows of A the leading rows of V^T L^-1, with
    the second moment L L^T of x and U S V^T = E[dy x^T] L^-T. A0 is an orthonormal basis of their span, of the norm of
    rows of plain LoRA's, so that learning rates carry over; what is missing of a gradient of low rank is arbitrary.

    Source: Izenman 1975, Reduced-rank regression for the multivariate linear model.
    """
    A_RN, _ = _regression(inputs)
    return LoraFactors(A_RN=A_RN.float().contiguous(), B_MR=torch.zeros(inputs.M, inputs.r))


def rrr_step(inputs: SchemeInputs) -> LoraFactors:
    """Reduced-rank regression with a step down the loss: A0 as of `rrr`, and B0 A0 along the best predictor of dy.

    B0 has the norm sqrt(M) times `step`, the same for all targets: a unit of step moves each output by as much.
    """
    A_RN, B_MR = _regression(inputs)
    norm = torch.linalg.vector_norm(B_MR).clamp_min(torch.finfo(torch.float32).tiny)
    step_MR = B_MR * (-inputs.step * math.sqrt(inputs.M) / norm)
    return LoraFactors(A_RN=A_RN.float().contiguous(), B_MR=step_MR.float().contiguous())


def _regression(inputs: SchemeInputs) -> tuple[Tensor, Tensor]:
    """A_RN with orthogonal rows and B_MR of the predictor B A = U_r S_r V_r^T L^-1; float64."""
    r, svd = inputs.r, inputs.svd
    assert svd is not None and r <= svd.width, "reduced-rank regression needs r triplets of the gradient"
    Q_NR, R_RR = thin_qr(svd.Vh_KN[:r].double().T)
    B_MR = svd.U_MK[:, :r].double() * svd.S_K[:r].double() @ R_RR.T
    return Q_NR.T * KAIMING_ROW_NORM, B_MR / KAIMING_ROW_NORM


def pissa(inputs: SchemeInputs) -> LoraFactors:
    """PiSSA: s B0 A0 is the weight's own best rank-r approximation. With W ~ U S V^T, B = U_r sqrt(S_r / s),
    A = sqrt(S_r / s) V_r^T.

    Source: arXiv 2404.02948; PEFT's `init_lora_weights="pissa"`.
    """
    assert inputs.W_MN is not None, "PiSSA needs W_MN"
    r = inputs.r
    oversampling = _pissa_width(inputs.M, inputs.N, r) - r
    svd = truncated_svd(inputs.W_MN.float(), rank=r, oversampling=oversampling, generator=inputs.generator)
    root_R = (svd.S_K[:r] / inputs.scaling).sqrt()
    return LoraFactors(
        A_RN=(root_R[:, None] * svd.Vh_KN[:r]).contiguous(), B_MR=(svd.U_MK[:, :r] * root_R).contiguous()
    )


def olora(inputs: SchemeInputs) -> LoraFactors:
    """OLoRA: with W = Q R, B0 is the first r columns of Q and A0 the first r rows of R.

    These columns depend on the first r of W alone, and A0 = B0^T W, so that no whole Q is made.

    Source: arXiv 2406.01775; PEFT's `init_lora_weights="olora"`, which factorizes a transposed weight as it is stored.
    """
    assert inputs.W_MN is not None, "OLoRA needs W_MN"
    B_MR = thin_qr(inputs.W_MN[:, : inputs.r].double())[0].float().contiguous()
    return LoraFactors(A_RN=(B_MR.T @ inputs.W_MN.float()).contiguous(), B_MR=B_MR)


def kaiming(inputs: SchemeInputs) -> LoraFactors:
    """Plain LoRA as PEFT starts it: A uniform within 1 / sqrt(N), B zero."""
    A_RN = torch.empty(inputs.r, inputs.N)
    torch.nn.init.kaiming_uniform_(A_RN, a=math.sqrt(5), generator=inputs.generator)
    return LoraFactors(A_RN=A_RN, B_MR=torch.zeros(inputs.M, inputs.r))


def _pissa_width(M: int, N: int, r: int) -> int:
    """Columns of the truncated SVD. Weights' spectra are flat, and distance to the last column is what converges."""
    return min(r + max(r, 32), M, N)


def _pissa_bytes(M: int, N: int, r: int) -> int:
    return 4 * M * N + truncated_svd_bytes(M, N, _pissa_width(M, N, r))


def _olora_bytes(M: int, N: int, r: int) -> int:
    return 4 * M * N + 16 * M * r + 4 * r * (M + N)


def _random(r: int, generator: torch.Generator) -> Indices:
    index_A_R, index_B_R = torch.randperm(2 * r, generator=generator, device=generator.device).split(r)
    return index_A_R, index_B_R


def _stable(inputs: SchemeInputs, S_B_R: Tensor) -> Multipliers:
    # Forward output and first-step update keep their size over widths and ranks: theorem 3.2 of the paper.
    factor = inputs.M**0.25 / math.sqrt(inputs.stable_gamma)
    return factor, factor


def _weight_svd(inputs: SchemeInputs, S_B_R: Tensor) -> Multipliers:
    assert inputs.weight_S_K is not None, "the scale weight_svd needs weight_S_K"
    factor = (inputs.weight_S_K[: inputs.r] / inputs.scaling).sqrt().mean().item()
    return factor, factor


def _peft(inputs: SchemeInputs, S_B_R: Tensor) -> Multipliers:
    # PEFT's own "stable": only B is scaled, and by the gradient's singular values, so it depends on the loss scale.
    return 1.0, S_B_R * (inputs.M**0.25 / math.sqrt(inputs.stable_gamma))


DIRECTIONS: dict[str, Callable[[int, torch.Generator], Indices]] = {
    "ArB2r": lambda r, generator: (torch.arange(r), torch.arange(r, 2 * r)),
    "A2rBr": lambda r, generator: (torch.arange(r, 2 * r), torch.arange(r)),
    "ArBr": lambda r, generator: (torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)),
    "random": _random,
}

_LOWER_ALPHA_OR_RAISE_GAMMA = "lower lora.lora_alpha or raise init.stable_gamma"

SCALES: dict[str, Scale] = {
    "stable": Scale(multipliers=_stable, smaller_offset=_LOWER_ALPHA_OR_RAISE_GAMMA),
    "unit": Scale(multipliers=lambda inputs, S_B_R: (1.0, 1.0), smaller_offset="lower lora.lora_alpha"),
    # divides by the square of s
    "gd": Scale(
        multipliers=lambda inputs, S_B_R: (1 / inputs.scaling, 1 / inputs.scaling),
        smaller_offset="raise lora.lora_alpha",
    ),
    # divides by s
    "weight_svd": Scale(
        multipliers=_weight_svd,
        smaller_offset="write init.scale stable",
        needs_weight=True,
        workspace_bytes=lambda M, N, r: 4 * M * N + truncated_svd_bytes(M, N, min(2 * r, M, N)),
    ),
    "peft": Scale(multipliers=_peft, smaller_offset=_LOWER_ALPHA_OR_RAISE_GAMMA),
}

_RSLORA_SCALING = 16 / math.sqrt(8)

SCHEMES: dict[str, Scheme] = {
    "lora_ga": Scheme(
        title="LoRA-GA",
        source="gradient",
        factors=lora_ga,
        num_triplets=lambda r: 2 * r,
        changes_base=True,
        starts_at_model=True,
        missing_directions="the missing columns of B start at zero, as in plain LoRA",
        init_keys=("direction", "scale", "stable_gamma", "rank_budget"),
        stable_gamma=16.0,
        best_rate=BestRate(times_full=0.5, scaling=_RSLORA_SCALING),
    ),
    "lora_one": Scheme(
        title="LoRA-One",
        source="gradient",
        factors=lora_one,
        num_triplets=lambda r: r,
        changes_base=False,
        starts_at_model=False,
        missing_directions="the missing rows of A and columns of B start near zero and hardly learn",
        init_keys=("stable_gamma", "rank_budget"),
        stable_gamma=128.0,
        best_rate=BestRate(times_full=4, scaling=_RSLORA_SCALING),
        smaller_offset=_LOWER_ALPHA_OR_RAISE_GAMMA,
    ),
    "rrr": Scheme(
        title="RRR",
        source="gradient",
        factors=rrr,
        num_triplets=lambda r: r,
        changes_base=False,
        starts_at_model=True,
        whitens=True,
        missing_directions="the missing rows of A are arbitrary, as in plain LoRA",
        init_keys=("whitening", "damping", "rank_budget"),
        best_rate=BestRate(times_full=4, scaling=_RSLORA_SCALING),
    ),
    "rrr_step": Scheme(
        title="RRR with a step",
        source="gradient",
        factors=rrr_step,
        num_triplets=lambda r: r,
        changes_base=False,
        starts_at_model=False,
        whitens=True,
        takes_step=True,
        missing_directions="the missing rows of A are arbitrary, as in plain LoRA",
        init_keys=("whitening", "damping", "step", "rank_budget"),
        best_rate=BestRate(times_full=2, scaling=_RSLORA_SCALING),
        smaller_offset="lower init.step",
    ),
    "pissa": Scheme(
        title="PiSSA",
        source="weight",
        factors=pissa,
        num_triplets=lambda r: r,
        changes_base=True,
        starts_at_model=True,
        best_rate=BestRate(times_full=2, scaling=2.0),
        workspace_bytes=_pissa_bytes,
    ),
    "olora": Scheme(
        title="OLoRA",
        source="weight",
        factors=olora,
        num_triplets=lambda r: r,
        changes_base=True,
        starts_at_model=True,
        workspace_bytes=_olora_bytes,
    ),
    "kaiming": Scheme(
        title="LoRA",
        source="nothing",
        factors=kaiming,
        num_triplets=lambda r: 0,
        changes_base=False,
        starts_at_model=True,
        best_rate=BestRate(times_full=8, scaling=2.0),
    ),
}
