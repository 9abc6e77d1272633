"""The adapters of an output directory read back, and the base it belongs to, held against its report."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraga_dist.artifacts.adapter import AdapterFile, adapter_entries, rank_and_scaling, saved_key
from loraga_dist.artifacts.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, REPORT
from loraga_dist.artifacts.report import Report
from loraga_dist.artifacts.residual import digest_base
from loraga_dist.errors import RunError, UserError
from loraga_dist.files.checksums import TensorDigest, fingerprint
from loraga_dist.files.disk import read_json
from loraga_dist.files.safetensors_io import TensorSlot, dtype_name
from loraga_dist.model.base import read_checkpoint_index, resolve_model_dir
from loraga_dist.model.targets import Target

if TYPE_CHECKING:
    from peft import LoraConfig


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
        said = report.targets[target.name]
        if target.r != said.r:
            raise RunError(f"{ADAPTER_CONFIG} gives {target.name} rank {target.r}, {REPORT} says {said.r}")
        if not math.isclose(target.scaling, said.scaling, rel_tol=1e-9):
            raise RunError(f"{ADAPTER_CONFIG} scales {target.name} by {target.scaling}, {REPORT} says {said.scaling}")
    # copies for modules_to_save are held against the base, where there is one
    expected = adapter_entries(targets, use_dora=use_dora, saved={})
    found = {key: slot.shape for key, slot in adapter.slots.items()}
    for name in report.saved_parameters:
        if found.pop(saved_key(name), None) is None:
            raise RunError(f"{saved_key(name)} is missing, which PEFT wants for modules_to_save")
    shapes = {key: shape for key, (_, shape) in expected.items()}
    if found != shapes:
        key = min(key for key in found.keys() | shapes.keys() if found.get(key) != shapes.get(key))
        raise RunError(f"{key} has shape {found.get(key)} and should have {shapes.get(key)}")
    for key, (dtype, _) in expected.items():
        if adapter.slots[key].dtype != dtype:
            raise RunError(f"{key} is stored as {dtype_name(adapter.slots[key].dtype)}, not {dtype_name(dtype)}")
    return adapter, targets


def load_start(directory: Path, report: Report) -> tuple[AdapterFile, list[Target]]:
    """The `loraga_init` that the report tells of, and no other adapter in its place; raises RunError."""
    adapter, targets = load_adapter(directory, report)
    if report.adapter_fingerprint not in (None, adapter_fingerprint(adapter)):
        raise RunError(f"{ADAPTER_WEIGHTS} is not what its {REPORT} tells of")
    return adapter, targets


def adapter_fingerprint(adapter: AdapterFile) -> str:
    """Of the adapter's tensors, as a report names it."""
    return fingerprint(digest_base(adapter.slots, adapter.slots))


def targets_under(config: LoraConfig, report: Report) -> list[Target]:
    """The report's targets with the ranks and scalings that an adapter config gives them; raises RunError."""
    targets = []
    for target in report.lora_targets:
        try:
            r, lora_alpha, scaling = rank_and_scaling(config, target.pattern_name)
        except (ArithmeticError, TypeError, ValueError, re.error) as error:
            raise RunError(f"{ADAPTER_CONFIG} gives {target.name} no rank and scaling ({error})") from error
        targets.append(replace(target, r=r, lora_alpha=lora_alpha, scaling=scaling))
    return targets


def read_lora_config(directory: Path) -> LoraConfig:
    """`adapter_config.json` as PEFT reads it; raises RunError when it is not one of LoRA."""
    from peft import LoraConfig, PeftConfig

    read_json(directory / ADAPTER_CONFIG)  # where it is missing, PEFT would go and ask the hub
    try:
        with warnings.catch_warnings(action="ignore"):  # it warns of all keys that it does not know
            config = PeftConfig.from_pretrained(str(directory))
    except Exception as error:  # whatever PEFT makes of values that are not its own
        raise RunError(f"PEFT cannot load {ADAPTER_CONFIG} ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(config, LoraConfig):
        raise RunError(f"{ADAPTER_CONFIG} is of {config.peft_type}, not of LORA")
    return config


def keys_passed_over(directory: Path, config: LoraConfig) -> list[str]:
    """What stands in `adapter_config.json` with a value and is nothing to this version of PEFT, which read `config`."""
    content = read_json(directory / ADAPTER_CONFIG)
    return sorted(key for key, value in content.items() if value and not hasattr(config, key))


@dataclass(frozen=True, kw_only=True)
class OriginalBase:
    """The checkpoint of the original model."""

    directory: Path
    index: dict[str, TensorSlot]

    @classmethod
    def open(cls, report: Report, base: Path | None) -> OriginalBase:
        """`base`, or what the report names. Raises UserError."""
        model = report.config.model
        directory = resolve_model_dir(model.name_or_path, model.revision) if base is None else named_base(base)
        return cls(directory=directory, index=read_checkpoint_index(directory))

    @property
    def num_bytes(self) -> int:
        return sum(slot.num_bytes for slot in self.index.values())

    def require_same(self, report: Report, weights: Mapping[str, TensorDigest]) -> None:
        """Raise UserError unless the start was made for it, whose weights have these digests."""
        if fingerprint(weights) != report.base_fingerprint:
            problem = "is not the base of loraga_init: its weights have another fingerprint"
            raise UserError("--base", str(self.directory), problem)


def named_base(base: Path) -> Path:
    """The directory that `--base` names, absolute; raises UserError where there is none."""
    if not base.is_dir():
        raise UserError("--base", str(base), "is not there; write the original model's directory")
    return base.resolve()
