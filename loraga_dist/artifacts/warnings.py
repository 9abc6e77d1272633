"""What a user should look at before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraga_dist.artifacts.report import IdentityCheck, TargetReport
from loraga_dist.config import SchemeConfig
from loraga_dist.model.left_out import LeftOut
from loraga_dist.schemes import SCHEMES

LOW_SPLIT_HALF_COSINE = 0.5
"""Below it two halves of the data disagree on the gradient more than they agree."""

LOW_WINDOW_CAPTURE = 0.7
"""Below it a window of the data held much energy outside the sketch's bases."""

LARGE_OFFSET_RATIO = 1
"""Above it the start changes a weight by more than its own size."""

MANY_ROUNDINGS = 4
"""Above it the residual base is further from the model than another rounding of its weights would be."""

_MORE_DATA = {
    "max_samples": "raise calibration.max_samples, or write auto",
    "sample_limit": "raise calibration.sample_limit",
    "target_cosine": "raise calibration.target_cosine",
    "data": "all of the data was used; add more",
}
"""How to get more calibration data, by what ended it this time."""

_MOST_NAMED = 3


def find_warnings(
    init: SchemeConfig,
    targets: Mapping[str, TargetReport],
    *,
    stopped_by: str | None,
    refine_passes: int | None,
    identity: IdentityCheck | None = None,
    left_out: Sequence[LeftOut] = (),
    cautions: Sequence[str] = (),
) -> list[str]:
    """What a user should look at before training: one line each, with the worst targets, and what to do.

    stopped_by, refine_passes: None where no gradient was taken. identity: None where no logits were compared, or files
    are not rounded as the model in memory is.
    """
    scheme = SCHEMES[init.scheme]

    def known(field: str) -> dict[str, float]:
        values = {name: getattr(target, field) for name, target in targets.items()}
        return {name: value for name, value in values.items() if value is not None}

    large = {name: ratio for name, ratio in known("offset_ratio").items() if ratio > LARGE_OFFSET_RATIO}
    noisy = {name: cosine for name, cosine in known("split_half_cosine").items() if cosine < LOW_SPLIT_HALF_COSINE}
    drifted = {name: capture for name, capture in known("window_capture").items() if capture < LOW_WINDOW_CAPTURE}
    unrouted = [name for name, rank in known("numerical_rank").items() if rank == 0]
    deficient = {
        name: rank
        for name, rank in known("numerical_rank").items()
        if 0 < rank < len(targets[name].singular_values or ())
    }
    lines = [*cautions, *(part.text for part in left_out)]
    if large:
        rounding = "; output.residual_dtype float32 keeps the rounding small" if scheme.changes_base else ""
        lines.append(
            f"offset_ratio above {LARGE_OFFSET_RATIO} (s*B0*A0 outweighs W) in {_worst(large, targets, highest=True)}: "
            f"{scheme.smaller_offset_at(init.scale)}{rounding}"
        )
    if identity is not None and identity.roundings is not None and identity.roundings > MANY_ROUNDINGS:
        unchanged = " or ".join(name for name, other in SCHEMES.items() if not other.changes_base)
        lines.append(
            f"KL from the model {identity.kl:.2g} per token, {identity.roundings:.2g} x that of another "
            f"{identity.dtype} rounding of the weights: write output.residual_dtype float32, or "
            f"{scheme.smaller_offset_at(init.scale)}; init.scheme {unchanged} leaves the base as it is"
        )
    if stopped_by is None:
        return lines
    if init.rank_budget is not None:
        left = init.rank_budget - sum(target.r * sum(target.shape) for target in targets.values())
        if left >= min(sum(target.shape) for target in targets.values()):
            lines.append(
                f"init.rank_budget {init.rank_budget}: {left} parameters were not spent, every target has the largest "
                "rank or all directions its gradient has; raise lora.r (and lora.lora_alpha with it) to allow larger "
                "ranks"
            )
    if unrouted:
        named = ", ".join(unrouted[:_MOST_NAMED]) + (", ..." if len(unrouted) > _MOST_NAMED else "")
        lines.append(
            f"{len(unrouted)} of {len(targets)} targets ({named}) got no gradient, their experts no supervised token: "
            f"they start with arbitrary A, and B zero; use more data ({_MORE_DATA[stopped_by]})"
        )
    if noisy:
        lines.append(
            f"split_half_cosine below {LOW_SPLIT_HALF_COSINE} in {_worst(noisy, targets)}: two halves of the data "
            f"disagree on the gradient; {_MORE_DATA[stopped_by]}"
        )
    if drifted and not refine_passes:  # a refine pass sees all data with the final bases
        lines.append(
            f"window_capture below {LOW_WINDOW_CAPTURE} in {_worst(drifted, targets)}: the gradient changed while the "
            "data went by; set gradient.refine_passes 1, or mix the data better: raise "
            "calibration.per_device_batch_size"
        )
    if deficient:
        lines.append(
            f"the gradient has fewer directions than {scheme.title} takes in {_worst(deficient, targets)}: "
            f"{scheme.missing_directions}; lower lora.r, or use more data ({_MORE_DATA[stopped_by]})"
        )
    return lines


def _worst(found: Mapping[str, float], targets: Mapping[str, TargetReport], *, highest: bool = False) -> str:
    """How many of the targets, and the first few from the worst on with their figures."""
    names = sorted(found, key=found.__getitem__, reverse=highest)
    shown = ", ".join(f"{name} {found[name]:.3g}" for name in names[:_MOST_NAMED])
    return f"{len(names)} of {len(targets)} targets ({shown}{', ...' if len(names) > _MOST_NAMED else ''})"
