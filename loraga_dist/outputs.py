"""A run's files, from factors and base checkpoint to a directory that verifies."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from loraga_dist.artifacts.adapter import AdapterFile, AdapterTarget, write_adapter
from loraga_dist.artifacts.factors import write_factors
from loraga_dist.artifacts.finished import FinishedFiles
from loraga_dist.artifacts.manifest import TensorDigest, fingerprint, sha256_of, write_checksums
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
from loraga_dist.artifacts.parallel import shares
from loraga_dist.artifacts.report import SCHEMA_VERSION, find_warnings, finite, readme, versions
from loraga_dist.artifacts.report_page import write_report_page
from loraga_dist.artifacts.residual import digest_base, finish_residual_base, write_residual_files
from loraga_dist.artifacts.verify import bytes_to_verify, verify
from loraga_dist.config import InitConfig
from loraga_dist.distributed import World
from loraga_dist.errors import RunError, VerificationError
from loraga_dist.job import Job
from loraga_dist.progress import phase
from loraga_dist.resume import RunKeeper
from loraga_dist.safetensors_files import TensorSlot
from loraga_dist.schemes import LoraFactors
from loraga_dist.start import Start
from loraga_dist.stream import Calibration
from loraga_dist.targets import peft_lora_config


@dataclass(frozen=True, kw_only=True)
class Fingerprints:
    """Content digests of the base and of the residual base, whatever files their tensors are split over."""

    base: str
    residual: str | None


def write_weights(
    directory: Path,
    job: Job,
    config: InitConfig,
    start: Start,
    factors: Mapping[str, LoraFactors],
    finished_files: Path,
    keeper: RunKeeper,
    world: World,
) -> Fingerprints:
    """Adapters by rank 0, factors by their owners, the residual base's files shared out; a collective.

    factors: A0 and B0 of every target as stored, on rank 0. finished_files: where residual files are kept for another
    run of the same work, should this one be interrupted. Raises Preempted, on all ranks, when one was asked to stop.
    """
    adapter_digest = ""
    names = [FACTORS] + ([RESIDUAL_BASE] if config.output.residual_base == "full" else [])
    with world.together():
        if world.is_main:
            for name in (*names, LORAGA_INIT, LORAGA_OFFSET):
                (directory / name).mkdir()
            saved = {name: job.base.index[key] for name, key in job.saved_parameters.items()}
            write_adapters(directory, config, job.targets, lambda name: (factors[name].A_RN, factors[name].B_MR), saved)
            adapter_digest = sha256_of(directory / LORAGA_INIT / ADAPTER_WEIGHTS)
    work = {**keeper.work, "adapter": world.all_texts(adapter_digest)[0]}
    write_factors(directory / FACTORS, {name: found.svd for name, found in start.calibration.owned.items()}, world)

    share = shares(job.residual_files, lambda file: file.num_bytes, world.size)[world.rank]
    digests: dict[str, list[TensorDigest]] = {}
    with world.together():
        num_bytes = sum(file.num_bytes for file in share)
        with phase("write", num_bytes, "B", shown=world.is_main) as progress:
            if config.output.residual_base == "full":
                finished = FinishedFiles(finished_files, work)
                into, adapter = directory / RESIDUAL_BASE, AdapterFile(directory / LORAGA_INIT)
                for file in share:
                    keeper.leave_here_if_asked()
                    written = finished.take(file, into)
                    if written is None:
                        written = write_residual_files(
                            [file], job.base.index, job.targets, adapter, into, progress.advance
                        )
                        finished.keep(file, into, written)
                    else:
                        progress.advance(file.num_bytes)
                    digests |= {key: list(pair) for key, pair in written.items()}
            else:
                keys = [key for file in share for key in file.entries]
                digests = {key: [digest] for key, digest in digest_base(job.base.index, keys, progress.advance).items()}
    everyone: dict[str, list[TensorDigest]] = {}
    for share_of_rank in world.all_json(digests):
        for key, found in share_of_rank.items():
            everyone[key] = [TensorDigest.of_json(parts) for parts in found]
    with world.together():
        if world.is_main and config.output.residual_base == "full":
            finish_residual_base(
                job.base.directory, directory / RESIDUAL_BASE, job.residual_files, config.output.residual_dtype
            )
    return Fingerprints(
        base=fingerprint({key: found[0] for key, found in everyone.items()}),
        residual=fingerprint({key: found[1] for key, found in everyone.items()})
        if config.output.residual_base == "full"
        else None,
    )


def make_report(
    job: Job,
    config: InitConfig,
    start: Start,
    fingerprints: Fingerprints,
    seconds: Mapping[str, float],
    peak_bytes: int,
    planned_peak_bytes: int,
    world: World,
) -> dict[str, Any]:
    """The content of loraga_report.json; a collective."""
    per_rank = world.all_json([peak_bytes, planned_peak_bytes])
    weight_keys = {target.name: target.weight_key for target in job.targets}
    targets = {
        found.target.name: {
            "shape": [found.target.M, found.target.N],
            "r": found.target.r,
            "lora_alpha": found.target.lora_alpha,
            "scaling": found.target.scaling,
            "transposed": found.target.transposed,
            "weight_key": weight_keys[found.target.name],
            "singular_values": found.singular_values,
            "numerical_rank": found.numerical_rank,
            "captured_energy": found.captured_energy,
            "split_half_cosine": found.split_half_cosine,
            "window_capture": found.window_capture,
            "engine": found.engine,
            "offset_ratio": found.offset_ratio,
            "owner_rank": found.owner_rank,
        }
        for found in start.targets
    }
    calibration = start.calibration
    stopped_by = _stopped_by(job, calibration)
    return finite(
        {
            "schema_version": SCHEMA_VERSION,
            "config": config.model_dump(),
            "base_fingerprint": fingerprints.base,
            "residual_fingerprint": fingerprints.residual,
            "data_fingerprint": job.data_fingerprints[calibration.num_samples - 1],
            "versions": versions(),
            "world_size": world.size,
            "engine": config.gradient.engine,
            "refine_passes": calibration.refine_passes,
            "num_sequences": calibration.num_samples,
            "num_supervised_tokens": calibration.num_supervised_tokens,
            "stopped_by": stopped_by,
            "split_half_cosine": _median_cosine(start),
            "mean_loss": calibration.mean_loss,
            "seconds": dict(seconds),
            "peak_bytes_per_rank": [peak for peak, _ in per_rank],
            "planned_peak_bytes_per_rank": [planned for _, planned in per_rank],
            "state_bytes_per_rank": job.plan.state_bytes_per_rank,
            "targets": targets,
            "saved_parameters": job.saved_parameters,
            "identity_check": dataclasses.asdict(start.identity_check),
            "warnings": find_warnings(targets, stopped_by=stopped_by, refine_passes=calibration.refine_passes),
        }
    )


def _stopped_by(job: Job, calibration: Calibration) -> str:
    """What ended the calibration data: `target_cosine`, `sample_limit` or `max_samples`, or that there was no more."""
    if calibration.reached_target:
        return "target_cosine"
    wanted = job.config.calibration
    if len(job.data_fingerprints) < wanted.most_samples:
        return "data"
    return "sample_limit" if wanted.max_samples == "auto" else "max_samples"


def _median_cosine(start: Start) -> float | None:
    """Split-half cosine of the median target; None where there was a single microbatch."""
    known = [found.split_half_cosine for found in start.targets if found.split_half_cosine is not None]
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
    targets: Sequence[AdapterTarget],
    factors: Callable[[str], tuple[Tensor, Tensor]],
    saved: Mapping[str, TensorSlot],
) -> None:
    """`loraga_init` with the given A0, B0, asked for once per target, and `loraga_offset` with the stored A0, -B0."""
    of_init = peft_lora_config(config.lora)
    of_init.base_model_name_or_path = f"{config.output.dir}/{RESIDUAL_BASE}"
    write_adapter(directory / LORAGA_INIT, of_init, targets, factors, saved=saved)
    of_offset = peft_lora_config(config.lora)
    of_offset.base_model_name_or_path, of_offset.revision = config.model.name_or_path, config.model.revision
    stored = AdapterFile(directory / LORAGA_INIT)
    write_adapter(directory / LORAGA_OFFSET, of_offset, targets, stored.factors, negate_b=True, saved=saved)
