"""A run's files, from factors and base checkpoint to a directory that verifies."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from loraga_dist.artifacts.adapter import AdapterFile, write_adapter
from loraga_dist.artifacts.factors import write_factors
from loraga_dist.artifacts.names import (
    ADAPTER_WEIGHTS,
    FACTORS,
    LORAGA_INIT,
    LORAGA_OFFSET,
    README,
    REPORT,
    RESIDUAL_BASE,
    RESOLVED_CONFIG,
)
from loraga_dist.artifacts.report import SCHEMA_VERSION, finite, versions
from loraga_dist.artifacts.residual import (
    digest_base,
    finish_residual_base,
    plan_residual_files,
    start_magnitudes,
    write_residual_files,
    writes_residual,
)
from loraga_dist.artifacts.verify import bytes_to_verify, verify
from loraga_dist.artifacts.warnings import find_warnings
from loraga_dist.config import InitConfig, LoraSection
from loraga_dist.errors import RunError, VerificationError
from loraga_dist.files.checksums import TensorDigest, fingerprint, sha256_of, write_checksums
from loraga_dist.files.parallel import shares
from loraga_dist.files.safetensors_io import TensorSlot
from loraga_dist.gradients.gradients import DataUsed
from loraga_dist.model.rank_budget import spent_budget
from loraga_dist.model.targets import Target, peft_lora_config
from loraga_dist.publish.page import write_report_page
from loraga_dist.publish.text import readme
from loraga_dist.ranks.progress import phase
from loraga_dist.ranks.world import World
from loraga_dist.request.request import CheckpointRequest
from loraga_dist.run.checkpointer import RunCheckpointer
from loraga_dist.run.finished import FinishedFiles
from loraga_dist.schemes import SCHEMES
from loraga_dist.start.in_place import Start

_OF_CALIBRATION = (
    "data_fingerprint",
    "engine",
    "refine_passes",
    "num_sequences",
    "num_supervised_tokens",
    "stopped_by",
    "split_half_cosine",
    "mean_loss",
)


@dataclass(frozen=True, kw_only=True)
class Fingerprints:
    """Content digests of the base and of the residual base, whatever files their tensors are split over."""

    base: str
    residual: str | None


def write_weights(
    directory: Path,
    request: CheckpointRequest,
    start: Start,
    finished_files: Path,
    checkpointer: RunCheckpointer,
    world: World,
) -> Fingerprints:
    """Adapters by rank 0, factors by their owners, the residual base's files shared out; a collective. No factors where
    there was no gradient, no offset and residual base where the scheme leaves the base as it is.

    finished_files: where residual files are kept for another
    run of the same work, should this one be interrupted. Raises Preempted, on all ranks, when one was asked to stop.
    """
    adapter_digest, config, factors = "", request.config, start.factors
    gradients, has_residual = start.gradients, writes_residual(config)
    residual_files = plan_residual_files(request.base.index, config.output.residual_dtype)
    with world.together():
        if world.is_main:
            if gradients is not None:
                (directory / FACTORS).mkdir()
            if has_residual:
                (directory / RESIDUAL_BASE).mkdir()
            saved = {name: request.base.index[key] for name, key in request.saved_parameters.items()}
            write_adapters(
                directory,
                config,
                start.lora,
                start.targets,
                lambda name: (factors[name].A_RN, factors[name].B_MR),
                saved,
                request.base.index,
            )
            adapter_digest = sha256_of(directory / LORAGA_INIT / ADAPTER_WEIGHTS)
    work = {**checkpointer.work, "adapter": world.all_texts(adapter_digest)[0]}
    if gradients is not None:
        write_factors(directory / FACTORS, gradients.owned, world)

    finished, kept = FinishedFiles(finished_files, work), []
    with world.together():
        if world.is_main:
            kept = finished.prune(residual_files if has_residual else [])
    kept = set(world.all_json(kept)[0])
    share = shares(residual_files, lambda file: 0 if file.name in kept else file.num_bytes, world.size)[world.rank]
    digests: dict[str, list[TensorDigest]] = {}
    with world.together():
        num_bytes = sum(file.num_bytes for file in share)
        with phase("write", num_bytes, "B", shown=world.is_main) as progress:
            if has_residual:
                into, adapter = directory / RESIDUAL_BASE, AdapterFile(directory / LORAGA_INIT)
                for file in share:
                    checkpointer.leave_here_if_asked()
                    written = finished.take(file, into)
                    if written is None:
                        written = write_residual_files(
                            [file], request.base.index, start.targets, adapter, into, progress.advance
                        )
                        finished.keep(file, into, written)
                    else:
                        progress.advance(file.num_bytes)
                    digests |= {key: list(pair) for key, pair in written.items()}
            else:
                keys = [key for file in share for key in file.entries]
                digests = {
                    key: [digest] for key, digest in digest_base(request.base.index, keys, progress.advance).items()
                }
    everyone: dict[str, list[TensorDigest]] = {}
    for share_of_rank in world.all_json(digests):
        for key, found in share_of_rank.items():
            everyone[key] = [TensorDigest.of_json(parts) for parts in found]
    with world.together():
        if world.is_main and has_residual:
            finish_residual_base(
                request.base.directory, directory / RESIDUAL_BASE, residual_files, config.output.residual_dtype
            )
    return Fingerprints(
        base=fingerprint({key: found[0] for key, found in everyone.items()}),
        residual=fingerprint({key: found[1] for key, found in everyone.items()}) if has_residual else None,
    )


def make_report(
    request: CheckpointRequest,
    start: Start,
    fingerprints: Fingerprints,
    seconds: Mapping[str, float],
    peak_bytes: int,
    planned_peak_bytes: int,
    world: World,
) -> dict[str, Any]:
    """The content of loraga_report.json; a collective."""
    per_rank = world.all_json([peak_bytes, planned_peak_bytes])
    config = request.config
    targets = {name: report.model_dump() for name, report in start.reports.items()}
    return finite(
        {
            "schema_version": SCHEMA_VERSION,
            "config": config.model_dump(),
            "base_fingerprint": fingerprints.base,
            "residual_fingerprint": fingerprints.residual,
            "versions": versions(),
            "world_size": world.size,
            **(about := _about_calibration(request, start)),
            "seconds": dict(seconds),
            "peak_bytes_per_rank": [peak for peak, _ in per_rank],
            "planned_peak_bytes_per_rank": [planned for _, planned in per_rank],
            "state_bytes_per_rank": request.plan.state_bytes_per_rank,
            "targets": targets,
            "rank_budget": spent_budget(config.init.rank_budget, start.targets),
            "saved_parameters": request.saved_parameters,
            "identity_check": start.identity_check.model_dump(),
            "warnings": find_warnings(
                config.init,
                targets,
                stopped_by=about["stopped_by"],
                refine_passes=about["refine_passes"],
            ),
        }
    )


def _about_calibration(request: CheckpointRequest, start: Start) -> dict[str, Any]:
    """What the report says of data and gradients as a whole; null where none were taken."""
    if start.gradients is None:
        return dict.fromkeys(_OF_CALIBRATION)
    found = start.gradients.data
    values = (
        request.data_fingerprints[found.num_samples - 1],
        request.config.gradient.engine,
        found.refine_passes,
        found.num_samples,
        found.num_supervised_tokens,
        _stopped_by(request, found),
        _median_cosine(start),
        found.mean_loss,
    )
    return dict(zip(_OF_CALIBRATION, values, strict=True))


def _stopped_by(request: CheckpointRequest, calibration: DataUsed) -> str:
    """What ended the calibration data: `target_cosine`, `sample_limit` or `max_samples`, or that there was no more."""
    if calibration.reached_target:
        return "target_cosine"
    wanted = request.config.calibration
    if len(request.data_fingerprints) < wanted.most_samples:
        return "data"
    return "sample_limit" if wanted.max_samples == "auto" else "max_samples"


def _median_cosine(start: Start) -> float | None:
    """Split-half cosine of the median target; None where there was a single microbatch."""
    cosines = [report.split_half_cosine for report in start.reports.values()]
    known = [cosine for cosine in cosines if cosine is not None]
    return statistics.median(known) if known else None


def finish_directory(directory: Path, config: InitConfig, report: Mapping[str, Any], world: World) -> str:
    """The text files, the page, the checksums, and the verification of it all; returns what was verified.

    A collective: ranks share the reading. Raises RunError when a file cannot be written, VerificationError when the
    directory does not verify.
    """
    with world.together():
        if world.is_main:
            _write_texts(directory, config, report)
            write_report_page(directory, report)
    write_checksums(directory, world)
    with phase("verify", bytes_to_verify(directory) // world.size, "B", shown=world.is_main) as progress:
        result = verify(directory, world=world, on_progress=progress.advance)
    with world.together():
        if not result.ok:
            raise VerificationError(f"verify: {'; '.join(result.problems[:5])}")
    if not result.residual_checked:
        return f"{result.num_targets} targets"
    return f"{result.num_targets} targets, W - (W_res + s*B0*A0) within {result.max_rounding_units:.2f} of one rounding"


def _write_texts(directory: Path, config: InitConfig, report: Mapping[str, Any]) -> None:
    texts = {
        REPORT: json.dumps(report, indent=2, allow_nan=False) + "\n",
        RESOLVED_CONFIG: yaml.safe_dump(config.model_dump(), sort_keys=False),
        README: readme(report),
    }
    for name, text in texts.items():
        try:
            (directory / name).write_text(text)
        except OSError as error:
            raise RunError(f"write: {directory / name} cannot be written ({error.strerror})") from error


def write_adapters(
    directory: Path,
    config: InitConfig,
    lora: LoraSection,
    targets: Sequence[Target],
    factors: Callable[[str], tuple[Tensor, Tensor]],
    saved: Mapping[str, TensorSlot],
    base: Mapping[str, TensorSlot],
) -> None:
    """`loraga_init` with the given A0, B0, asked for once per target, and, if it belongs on another base than the
    original, `loraga_offset` with the stored A0, -B0.

    lora: the config's, with the ranks and alphas of `targets`. base: the checkpoint, whose norms DoRA's magnitudes are;
    the offset is a plain LoRA always, because merging it is what changes W.
    """
    of_residual, of_original = peft_lora_config(lora), peft_lora_config(lora)
    of_residual.base_model_name_or_path = f"{config.output.dir}/{RESIDUAL_BASE}"
    of_original.base_model_name_or_path, of_original.revision = config.model.name_or_path, config.model.revision
    changes_base = SCHEMES[config.init.scheme].changes_base
    of_init = of_residual if changes_base else of_original

    def magnitudes(target: Target, A_RN: Tensor, B_MR: Tensor) -> Tensor:
        return start_magnitudes(base[target.weight_key], target, A_RN, B_MR, changes_base=changes_base)

    write_adapter(
        directory / LORAGA_INIT,
        of_init,
        targets,
        factors,
        magnitudes=magnitudes if config.lora.use_dora else None,
        saved=saved,
    )
    if not changes_base:
        return
    stored = AdapterFile(directory / LORAGA_INIT)
    write_adapter(directory / LORAGA_OFFSET, of_original, targets, stored.factors, negate_b=True, saved=saved)
