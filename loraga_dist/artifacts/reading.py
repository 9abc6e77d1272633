"""An output directory read back from its files: what its report says, its adapters, the base it belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, PositiveInt, ValidationError, field_validator

from loraga_dist.artifacts.adapter import AdapterFile, adapter_keys, magnitude_key, rank_and_scaling, saved_key
from loraga_dist.artifacts.names import ADAPTER_CONFIG, REPORT
from loraga_dist.artifacts.report import SCHEMA_VERSION
from loraga_dist.config import Dtype, SchemeName
from loraga_dist.errors import RunError
from loraga_dist.files.safetensors_io import TensorSlot, dtype_name
from loraga_dist.model.base import read_checkpoint_index, resolve_model_dir
from loraga_dist.model.targets import Target
from loraga_dist.schemes import SCHEMES, Scheme

if TYPE_CHECKING:
    from peft import LoraConfig


class ReportModel(BaseModel):
    name_or_path: str
    revision: str | None = None


class ReportLora(BaseModel):
    use_dora: bool


class ReportInit(BaseModel):
    scheme: SchemeName


class ReportOutput(BaseModel):
    residual_base: Literal["full", "none"]
    residual_dtype: Dtype


class ReportConfig(BaseModel):
    model: ReportModel
    lora: ReportLora
    init: ReportInit
    output: ReportOutput


class ReportTarget(BaseModel):
    shape: tuple[PositiveInt, PositiveInt]
    r: PositiveInt
    weight_key: str
    transposed: bool


class ReportBudget(BaseModel):
    parameters: int
    spent: int


class Report(BaseModel):
    """The fields of the report that can be held against the files."""

    schema_version: int
    config: ReportConfig
    base_fingerprint: str
    residual_fingerprint: str | None
    targets: dict[str, ReportTarget]
    saved_parameters: dict[str, str] = {}
    rank_budget: ReportBudget | None = None

    @property
    def scheme(self) -> Scheme:
        return SCHEMES[self.config.init.scheme]

    @property
    def is_dora(self) -> bool:
        return self.config.lora.use_dora

    @field_validator("schema_version")
    @classmethod
    def _known_version(cls, value: int) -> int:
        if value != SCHEMA_VERSION:
            raise ValueError(f"is {value}, this version reads {SCHEMA_VERSION}")
        return value


def read_report(directory: Path) -> Report:
    """The report of an output directory; raises RunError for one that this version does not read."""
    try:
        return Report.model_validate_json((directory / REPORT).read_bytes())
    except OSError as error:
        raise RunError(
            f"{REPORT}: cannot be read ({error.strerror}); is this the directory of a finished run?"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise RunError(f"{REPORT}: {where}: {first['msg']}") from error


def load_adapter(directory: Path, report: Report, *, use_dora: bool | None = None) -> tuple[AdapterFile, list[Target]]:
    """The adapter of exactly the report's targets, scaled as PEFT will read its config; raises RunError.

    use_dora: as it should be; None is what the report says of `loraga_init`.
    """
    config = read_lora_config(directory)
    if config.init_lora_weights is not True:
        raise RunError(f"{ADAPTER_CONFIG} is not plain LoRA with init_lora_weights true")
    if use_dora is None:
        use_dora = report.is_dora
    if config.use_dora != use_dora:
        raise RunError(f"{ADAPTER_CONFIG} has use_dora {config.use_dora} and should have {use_dora}")
    adapter = AdapterFile(directory)
    targets = targets_under(config, report)
    for target in targets:
        if target.r != report.targets[target.name].r:
            raise RunError(
                f"{ADAPTER_CONFIG} gives {target.name} rank {target.r}, {REPORT} says {report.targets[target.name].r}"
            )
    expected = expected_shapes(targets, use_dora)
    found = {key: slot.shape for key, slot in adapter.slots.items()}
    for name in report.saved_parameters:
        if found.pop(saved_key(name), None) is None:
            raise RunError(f"{saved_key(name)} is missing, which PEFT wants for modules_to_save")
    if found != expected:
        key = min(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        raise RunError(f"{key} has shape {found.get(key)} and should have {expected.get(key)}")
    for key in expected:  # copies for modules_to_save keep the base's dtype
        if adapter.slots[key].dtype != torch.float32:
            raise RunError(f"{key} is stored as {dtype_name(adapter.slots[key].dtype)}, not F32")
    return adapter, targets


def targets_under(config: LoraConfig, report: Report) -> list[Target]:
    """The report's targets with the ranks and scalings that an adapter config gives them; raises RunError."""
    targets = []
    for name, target in report.targets.items():
        M, N = target.shape
        try:
            r, lora_alpha, scaling = rank_and_scaling(config, name)
        except (ArithmeticError, TypeError, ValueError, re.error) as error:
            raise RunError(f"{ADAPTER_CONFIG} gives {name} no rank and scaling ({error})") from error
        targets.append(
            Target(
                name=name,
                weight_key=target.weight_key,
                M=M,
                N=N,
                r=r,
                lora_alpha=lora_alpha,
                scaling=scaling,
                transposed=target.transposed,
            )
        )
    return targets


def expected_shapes(targets: Iterable[Target], use_dora: bool) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the factors, and DoRA's magnitudes, in the adapter file of these targets."""
    shapes: dict[str, tuple[int, ...]] = {}
    for target in targets:
        shapes |= zip(adapter_keys(target.name), ((target.r, target.N), (target.M, target.r)), strict=True)
        if use_dora:
            shapes[magnitude_key(target.name)] = (target.M,)
    return shapes


def read_lora_config(directory: Path) -> LoraConfig:
    """`adapter_config.json` as PEFT reads it; raises RunError when it is not one of LoRA."""
    from peft import LoraConfig, PeftConfig

    if not (directory / ADAPTER_CONFIG).is_file():  # PEFT would go and ask the hub
        raise RunError(f"{ADAPTER_CONFIG} is missing")
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise RunError(f"PEFT cannot load {ADAPTER_CONFIG} ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(config, LoraConfig):
        raise RunError(f"{ADAPTER_CONFIG} is of {config.peft_type}, not of LORA")
    return config


def open_base(report: Report, base: Path | None) -> tuple[Path, dict[str, TensorSlot]]:
    """Directory and tensors of the original model: `base`, or what the report names. Raises UserError."""
    model = report.config.model
    directory = base if base is not None else resolve_model_dir(model.name_or_path, model.revision)
    return directory, read_checkpoint_index(directory)
