"""What a run says of itself: loraga_report.json, one typed value that is written, read, shown, tracked and pushed."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    PositiveInt,
    ValidationError,
    field_serializer,
    field_validator,
)

from loraga_dist.artifacts.names import REPORT
from loraga_dist.config import InitConfig, SchemeConfig
from loraga_dist.errors import RunError
from loraga_dist.files.disk import MAX_NUMBERS_BYTES, BrokenFileError, read_bounded, write_json
from loraga_dist.model.coverage import Coverage
from loraga_dist.model.left_out import LeftOut
from loraga_dist.model.rank_budget import num_parameters
from loraga_dist.model.targets import StackPlace, Target
from loraga_dist.schemes import FULL_RATE, SCHEMES, Scheme, lora_scaling, times_full_rate

SCHEMA_VERSION = 1


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


Number = Annotated[float | None, AfterValidator(_finite)]
"""None where there is none, and for NaN and infinities, which JSON cannot say."""


class ReportPart(BaseModel):
    """Base of all parts of the report: typed, immutable; keys of other versions are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)


_OF_TARGET = {"r", "lora_alpha", "scaling", "transposed", "weight_key", "stack", "by_parameter"}
"""What `Target` and `TargetReport` call alike."""


class TargetReport(ReportPart):
    """What is known of one target. What a gradient would tell is None for schemes that take none."""

    shape: tuple[PositiveInt, PositiveInt]
    """M, N."""
    r: PositiveInt
    lora_alpha: int | float
    scaling: float
    transposed: bool
    weight_key: str
    stack: StackPlace | None = None
    """Where an expert's matrix is. It and the next are not in reports of earlier versions."""
    by_parameter: bool = False
    singular_values: list[float] | None = None
    """Of the mean gradient, as many as the scheme takes, descending."""
    num_converged: int | None = None
    """Leading ones that were asked of the engine; `factors/` holds more."""
    numerical_rank: int | None = None
    captured_energy: Number = None
    split_half_cosine: Number = None
    subspace_cosine: Number = None
    """The same within the left singular directions that were asked of the engine. It and the one below are not in
    reports of earlier versions."""
    input_rank: Number = None
    """Effective rank of the second moment of its input, where the scheme whitens."""
    window_capture: Number = None
    engine: str | None = None
    offset_ratio: Number = None
    """||s B0 A0||_F / ||W||_F."""
    owner_rank: int | None = None

    @classmethod
    def of(cls, target: Target, **facts: Any) -> TargetReport:
        """facts: what is known of it, by these names."""
        return cls(shape=(target.M, target.N), **{key: getattr(target, key) for key in _OF_TARGET}, **facts)


class IdentityCheck(ReportPart):
    """How far the start is from the original model: on calibration tokens, or seeded ones where there is no data."""

    max_abs_logit_diff: Number
    max_abs_logit: Number
    dtype: str
    """Of the model, in which both were computed."""
    kl: Number = None
    """KL(model || start), nats, mean per token."""
    kl_of_rounding: Number = None
    """KL(model || the model had its targets been rounded to `dtype` another way); None where no weight is rounded."""
    mean_loss_before: Number = None
    """Of the model, on the supervised of these tokens."""
    mean_loss_after: Number = None

    @property
    def roundings(self) -> float | None:
        """The start's divergence as a multiple of what another rounding makes."""
        return self.kl / self.kl_of_rounding if self.kl is not None and self.kl_of_rounding else None

    @property
    def summary(self) -> str:
        """All of it in a line."""
        parts = []
        if self.mean_loss_before is not None and self.mean_loss_after is not None:
            parts.append(f"mean loss of the tokens compared {self.mean_loss_before:.4f} -> {self.mean_loss_after:.4f}")
        if self.kl is not None:
            judged = "" if self.roundings is None else f", {self.roundings:.2g} x another {self.dtype} rounding"
            parts.append(f"KL {self.kl:.2g} per token{judged}")
        if self.max_abs_logit_diff is not None and self.max_abs_logit is not None:
            largest = f"largest {self.max_abs_logit:.3g} ({self.dtype})"
            parts.append(f"logits differ by {self.max_abs_logit_diff:.2e} at most, {largest}")
        return "; ".join(parts) or "no logits were compared"


class FoundStep(ReportPart):
    """What the search for the length of a first step found, on samples that the gradient has not seen."""

    length: float
    """0 where no step lowers the loss."""
    mean_loss_before: Number
    """Of the model as it is."""
    mean_loss_after: Number
    num_sequences: int
    """Or batches of a dataloader."""


class SpentBudget(ReportPart):
    """What became of `init.rank_budget`, in adapter parameters."""

    parameters: int
    spent: int

    @classmethod
    def of(cls, init: SchemeConfig, targets: Sequence[Target]) -> SpentBudget | None:
        """None where there is no budget. targets: with the ranks that it bought."""
        return None if init.rank_budget is None else cls(parameters=init.rank_budget, spent=num_parameters(targets))


class Rebuilt(ReportPart):
    """Where `loraga-dist rebuild` took the factors from."""

    source: str
    seconds: float


class Report(ReportPart):
    """The content of loraga_report.json.

    None or empty is what was not measured: what gradients tell where the scheme takes none, and what only a run of the
    command line knows where a start was saved from memory.
    """

    schema_version: int
    config: InitConfig
    base_fingerprint: str
    residual_fingerprint: str | None
    adapter_fingerprint: str | None = None
    """Of the tensors of `loraga_init`. It and the two below are not in reports of earlier versions."""
    factors_fingerprint: str | None = None
    model_files: dict[str, str] = {}
    """SHA-256 of what stands beside the weights in `residual_base`, written or to come: config.json, tokenizer, ..."""
    base_quantization: str | None = None
    """`quant_method` of the original model's files; None in floating point, and in reports of earlier versions."""
    weights_written_ns: dict[str, int] = {}
    """The mtime of each file of weights when all were written. Not in reports of earlier versions."""
    versions: dict[str, str] = {}
    world_size: int | None = None
    device: str | None = None
    """Name of rank 0's, `CPU` for one. Not in reports of earlier versions."""
    data_fingerprint: str | None = None
    engine: str | None = None
    order: str | None = None
    """In which calibration went through the model: `block` or `model`. Not in reports of earlier versions."""
    order_reason: str | None = None
    calibration_bytes_read: int | None = None
    """Where the weights stay in files: what calibration read of them."""
    refine_passes: int | None = None
    loss: str | None = None
    """`cross_entropy`, `dpo` or `policy_gradient`. Not in reports of earlier versions, which knew the first alone."""
    num_sequences: int | None = None
    """Of preference data, pairs."""
    num_supervised_tokens: int | None = None
    stopped_by: str | None = None
    split_half_cosine: Number = None
    """Of the median target."""
    mean_loss: Number = None
    """Over supervised tokens; of preference data over pairs. Weighted: docs/METHOD.md says what it means."""
    step: FoundStep | None = None
    """Of schemes that search one. Not in reports of earlier versions."""
    seconds: dict[str, float] = {}
    """By phase, and `total`."""
    peak_bytes_per_rank: list[int] = []
    planned_peak_bytes_per_rank: list[int] = []
    state_bytes_per_rank: int | None = None
    targets: dict[str, TargetReport]
    rank_budget: SpentBudget | None = None
    saved_parameters: dict[str, str] = {}
    """Checkpoint keys of the parameters that `modules_to_save` copies into the adapter."""
    identity_check: IdentityCheck | None = None
    coverage: Coverage | None = None
    """What of the model the targets are. It and the next are not in reports of earlier versions."""
    left_out: list[LeftOut] = []
    cautions: list[str] = []
    """What of the model's own behaviour the gradient does not follow; among the warnings. Not in reports of earlier
    versions."""
    warnings: list[str] = []
    rebuilt: Rebuilt | None = None
    """Written only where the output was rebuilt."""

    @field_validator("schema_version")
    @classmethod
    def _known_version(cls, value: int) -> int:
        if value != SCHEMA_VERSION:
            raise ValueError(f"is {value}, this version reads {SCHEMA_VERSION}")
        return value

    @field_validator("config", mode="before")
    @classmethod
    def _null_is_the_default(cls, config: Any) -> Any:
        # earlier versions took .inf, which is null in JSON; no key has null for a value and another default
        return _without_nulls(config)

    @field_serializer("config")
    def _what_is_known(self, config: InitConfig) -> dict[str, Any]:
        # a start that was saved from memory knows a few keys of a run's configuration, and claims no others
        return config.model_dump(mode="json", exclude_unset=self.world_size is None)

    @property
    def scheme(self) -> Scheme:
        return SCHEMES[self.config.init.scheme]

    @property
    def times_full_rate(self) -> float | None:
        """What full fine-tuning's learning rate is multiplied by for a first try at training from here."""
        lora = self.config.lora
        scaling = lora_scaling(lora.lora_alpha, lora.r, lora.use_rslora)
        return times_full_rate(self.scheme, self.config.init.scale, self.config.init.gamma, scaling)

    @property
    def learning_rate(self) -> float:
        """To try first, of one digit, where full fine-tuning's is not known."""
        return float(f"{(self.times_full_rate or 1) * FULL_RATE:.0e}")

    @property
    def is_dora(self) -> bool:
        return self.config.lora.use_dora

    @property
    def lora_targets(self) -> list[Target]:
        """The targets as they started."""
        return [
            Target(name=name, M=target.shape[0], N=target.shape[1], **{key: getattr(target, key) for key in _OF_TARGET})
            for name, target in self.targets.items()
        ]

    def write(self, path: Path) -> None:
        """Write the JSON file; raises RunError when that fails."""
        text = self.model_dump_json(exclude={"rebuilt"} if self.rebuilt is None else None)
        write_json(path, json.loads(text), "write: ")

    @classmethod
    def read(cls, directory: Path) -> Report:
        """The report of an output directory; raises RunError for one that this version does not read."""
        return cls.parse(read_report_text(directory))

    @classmethod
    def parse(cls, text: str | bytes) -> Report:
        """The report in this file content; raises RunError for one that this version does not read."""
        try:
            return cls.model_validate_json(text, extra="ignore")
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise RunError(f"{REPORT}: {where}: {first['msg'].removeprefix('Value error, ')}") from error


def _without_nulls(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {key: _without_nulls(value) for key, value in tree.items() if value is not None}


def read_report_text(directory: Path) -> str:
    """The content of an output directory's report; raises RunError where there is none to read."""
    try:
        return read_bounded(directory / REPORT, MAX_NUMBERS_BYTES).decode("utf-8")
    except (BrokenFileError, UnicodeDecodeError) as error:
        reason = error if isinstance(error, BrokenFileError) else error.reason
        raise RunError(f"{REPORT}: cannot be read ({reason}); is this the directory of a finished run?") from error


_PACKAGES = ("loraga_dist", "torch", "transformers", "peft", "deepspeed", "safetensors")


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide the result, by name."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
