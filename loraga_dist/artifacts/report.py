"""What a run says of itself: loraga_report.json."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt

from loraga_dist.model.targets import Target

SCHEMA_VERSION = 1


class ReportPart(BaseModel):
    """Base of all parts of the report: typed, immutable; keys of other versions are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class TargetReport(ReportPart):
    """What is known of one target. What a gradient would tell is None for schemes that take none."""

    shape: tuple[PositiveInt, PositiveInt]
    """M, N."""
    r: PositiveInt
    lora_alpha: int | float
    scaling: float
    transposed: bool
    weight_key: str
    singular_values: list[float] | None = None
    """Of the mean gradient, as many as the scheme takes, descending."""
    num_converged: int | None = None
    """Leading ones that were asked of the engine; `factors/` holds more."""
    numerical_rank: int | None = None
    captured_energy: float | None = None
    split_half_cosine: float | None = None
    window_capture: float | None = None
    engine: str | None = None
    offset_ratio: float | None = None
    """||s B0 A0||_F / ||W||_F."""
    owner_rank: int | None = None

    @classmethod
    def of(cls, target: Target, **facts: Any) -> TargetReport:
        """facts: what is known of it, by these names."""
        return cls(
            shape=(target.M, target.N),
            r=target.r,
            lora_alpha=target.lora_alpha,
            scaling=target.scaling,
            transposed=target.transposed,
            weight_key=target.weight_key,
            **facts,
        )


class IdentityCheck(ReportPart):
    """How far the start is from the original model: on calibration tokens, or seeded ones where there is no data."""

    max_abs_logit_diff: float | None
    max_abs_logit: float | None
    dtype: str


_PACKAGES = ("loraga_dist", "torch", "transformers", "peft", "deepspeed", "safetensors")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def finite(value: Any) -> Any:
    """The same structure with NaN and infinities as None, which JSON can say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
