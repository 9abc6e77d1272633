"""What an output directory holds: its parts, their files, keys and bytes; the page and its plots go beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from loraga_dist.artifacts.adapter import adapter_entries
from loraga_dist.artifacts.factors import triplet_entries
from loraga_dist.artifacts.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FACTORS,
    FACTORS_INDEX,
    LORAGA_INIT,
    LORAGA_OFFSET,
    MODEL_CONFIG,
    README,
    REPORT,
    RESIDUAL_BASE,
    RESOLVED_CONFIG,
    TENSORBOARD,
)
from loraga_dist.artifacts.report import Report
from loraga_dist.artifacts.residual import (
    PlannedFile,
    digest_model_files,
    plan_model_files,
    residual_entries,
)
from loraga_dist.artifacts.tensors import num_bytes_of
from loraga_dist.config import InitConfig, LoraSection
from loraga_dist.errors import RunError
from loraga_dist.files.checksums import CHECKSUMS, is_as_written, read_checksums
from loraga_dist.files.disk import UNFINISHED_MARK
from loraga_dist.files.parallel import over_cores
from loraga_dist.files.safetensors_io import Entries
from loraga_dist.files.staging import files_in
from loraga_dist.model.rank_budget import num_parameters
from loraga_dist.model.targets import Target, peft_lora_config
from loraga_dist.request.request import CheckpointRequest
from loraga_dist.schemes import SCHEMES

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parts of one output directory, before it is written or as its report says."""

    config: InitConfig
    targets: Sequence[Target]
    """With a rank budget that has not been spent yet, at their largest ranks."""
    saved_parameters: Mapping[str, str]
    """Checkpoint keys of the parameters that `modules_to_save` copies into the adapters."""
    base: Entries = field(default_factory=dict)
    """Dtypes and shapes of the original model, by checkpoint key; without them copies and residual have no bytes."""
    num_triplets: Mapping[str, int] = field(default_factory=dict)
    """Singular triplets in `factors/`, by target; a report does not tell."""

    @classmethod
    def of(cls, request: CheckpointRequest, targets: Sequence[Target] | None = None) -> Layout:
        """What a run will write. targets: with the ranks they have got, once a budget has been spent."""
        return cls(
            config=request.config,
            targets=request.targets if targets is None else targets,
            saved_parameters=request.saved_parameters,
            base=request.entries,
            num_triplets={name: matrix.num_kept for name, matrix in request.plan.matrices.items()},
        )

    @classmethod
    def of_report(cls, report: Report, base: Entries | None = None) -> Layout:
        """What a finished output holds. base: the original model's tensors, where they have been looked up."""
        return cls(
            config=report.config,
            targets=report.lora_targets,
            saved_parameters=report.saved_parameters,
            base=base or {},
        )

    @property
    def directories(self) -> list[str]:
        """Those that are written. `materialize-base` may add `residual_base` to one that has `loraga_offset`."""
        scheme = SCHEMES[self.config.init.scheme]
        written = {
            LORAGA_INIT: True,
            LORAGA_OFFSET: scheme.changes_base,
            FACTORS: scheme.source == "gradient",
            RESIDUAL_BASE: scheme.changes_base and self.config.output.residual_base == "full",
        }
        return [name for name, is_written in written.items() if is_written]

    @property
    def all_directories(self) -> list[str]:
        """Those that are written, and the one that `materialize-base` may add."""
        may_come = SCHEMES[self.config.init.scheme].changes_base and RESIDUAL_BASE not in self.directories
        return [*self.directories, RESIDUAL_BASE] if may_come else self.directories

    @property
    def files(self) -> list[str]:
        """Those without which the output is not whole, beside the report; of weights in several files their index."""
        of_directory = {
            LORAGA_INIT: [ADAPTER_CONFIG, ADAPTER_WEIGHTS],
            LORAGA_OFFSET: [ADAPTER_CONFIG, ADAPTER_WEIGHTS],
            FACTORS: [FACTORS_INDEX],
            RESIDUAL_BASE: [MODEL_CONFIG],
        }
        below = [f"{directory}/{name}" for directory in self.directories for name in of_directory[directory]]
        return [RESOLVED_CONFIG, README, CHECKSUMS, *below]

    def missing_files(self, directory: Path) -> list[str]:
        """Which of `files` are not in that directory."""
        return [name for name in self.files if not (directory / name).is_file()]

    @property
    def adapters(self) -> dict[str, Entries]:
        """The tensors of every adapter by its directory. The offset is a plain LoRA always: merging it changes W."""
        saved = {name: self.base[key] for name, key in self.saved_parameters.items() if key in self.base}
        return {
            directory: adapter_entries(
                self.targets, use_dora=self.config.lora.use_dora and directory == LORAGA_INIT, saved=saved
            )
            for directory in (LORAGA_INIT, LORAGA_OFFSET)
            if directory in self.directories
        }

    def lora_config(self, directory: str, lora: LoraSection) -> LoraConfig:
        """PEFT's config of the adapter in that directory, with the base it belongs on. lora: the section to take."""
        config = peft_lora_config(lora)
        if directory == LORAGA_INIT and LORAGA_OFFSET in self.directories:
            config.base_model_name_or_path = f"{self.config.output.dir}/{RESIDUAL_BASE}"
        else:
            model = self.config.model
            config.base_model_name_or_path, config.revision = model.name_or_path, model.revision
        return config

    @property
    def factors(self) -> Entries:
        """The tensors of `factors/`: U, S and Vh of every target, of which `num_triplets` tells the triplets."""
        entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for target in self.targets if FACTORS in self.directories else ():
            entries |= triplet_entries(target.name, target.M, self.num_triplets.get(target.name, 0), target.N)
        return entries

    @property
    def residual(self) -> Entries:
        """The tensors of `residual_base/`, whether the run writes it or `materialize-base` will."""
        return residual_entries(self.base, self.config.output.residual_dtype)

    @property
    def residual_files(self) -> list[PlannedFile]:
        """The weight files that a run writes to `residual_base/`."""
        return plan_model_files(self.residual) if RESIDUAL_BASE in self.directories else []

    def digest_model_files(self, model_dir: Path) -> dict[str, str]:
        """What stands beside the weights in `residual_base/`, whether the run writes it or `materialize-base` will."""
        if not SCHEMES[self.config.init.scheme].changes_base:
            return {}
        return digest_model_files(model_dir, self.config.output.residual_dtype)

    @property
    def num_bytes(self) -> dict[str, int]:
        """What the tensors of each directory take, 0 for those that are not written; with a rank budget, at most."""
        budget = self.config.init.rank_budget
        unspendable = 0 if budget is None else 4 * max(0, num_parameters(self.targets) - budget)
        found = {LORAGA_INIT: 0, LORAGA_OFFSET: 0, FACTORS: num_bytes_of(self.factors.values())}
        found |= {name: num_bytes_of(entries.values()) - unspendable for name, entries in self.adapters.items()}
        return found | {RESIDUAL_BASE: sum(file.num_bytes for file in self.residual_files)}


def strangers(directory: Path) -> list[str] | None:
    """Files in an output directory that are of no output, or no longer as they were written, by relative path; None
    where it has no report.

    A trainer may have saved its own over any of them. Weights are read only where their mtime is not the report's.
    """
    if not (directory / REPORT).is_file():
        return None
    listed = read_checksums(directory) or {}
    known = {REPORT, CHECKSUMS, UNFINISHED_MARK}
    if not listed:  # all that an earlier version's save_start wrote
        known |= {f"{LORAGA_INIT}/{name}" for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    written_ns: Mapping[str, int] = {}
    with suppress(RunError):  # another version's; then nothing counts as added
        report = Report.read(directory)
        written_ns = report.weights_written_ns
        may_come = report.scheme.changes_base and report.residual_fingerprint is None
        if may_come and (added := read_checksums(directory / RESIDUAL_BASE)):
            listed |= {f"{RESIDUAL_BASE}/{name}": sha256 for name, sha256 in added.items()}
            known.add(f"{RESIDUAL_BASE}/{CHECKSUMS}")

    def is_known(name: str) -> bool:
        if name in listed:
            return is_as_written(directory / name, listed[name], written_ns.get(name))
        if name.startswith(f"{TENSORBOARD}/"):
            return name.rpartition("/")[2].startswith("events.") or name.endswith("/hparams.yml")
        return name in known

    names = files_in(directory)
    return [name for name, ours in zip(names, over_cores(is_known, names), strict=True) if not ours]
