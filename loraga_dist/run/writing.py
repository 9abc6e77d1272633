"""A run's files, from factors and base checkpoint to a directory that verifies."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loraga_dist.artifacts.adapter import AdapterFile, write_adapter
from loraga_dist.artifacts.factors import write_factors
from loraga_dist.artifacts.layout import Layout
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
from loraga_dist.artifacts.reading import adapter_fingerprint
from loraga_dist.artifacts.report import SCHEMA_VERSION, Report, SpentBudget, TargetReport, versions
from loraga_dist.artifacts.residual import digest_base, finish_residual_base, start_magnitudes, write_residual_file
from loraga_dist.artifacts.verify import bytes_to_verify, verify
from loraga_dist.artifacts.warnings import find_warnings
from loraga_dist.config import LoraSection
from loraga_dist.errors import VerificationError
from loraga_dist.files.checksums import TensorDigest, fingerprint, sha256_of, write_checksums
from loraga_dist.files.disk import write_text
from loraga_dist.files.parallel import shares
from loraga_dist.files.safetensors_io import TensorSlot
from loraga_dist.gradients.checkpointer import Checkpointer
from loraga_dist.gradients.gradients import DataUsed
from loraga_dist.model.targets import Target
from loraga_dist.publish.page import write_report_page
from loraga_dist.publish.text import readme
from loraga_dist.ranks.progress import phase
from loraga_dist.ranks.world import World
from loraga_dist.request.request import CheckpointRequest
from loraga_dist.run.finished import FinishedFiles
from loraga_dist.schemes import SCHEMES, LoraFactors
from loraga_dist.start.in_place import Start
from loraga_dist.yaml_tree import dump


class Fingerprints(NamedTuple):
    """Content digests of the base and of what was written, whatever files their tensors are split over."""

    base: str
    residual: str | None = None
    adapter: str | None = None
    factors: str | None = None
    model_files: Mapping[str, str] = MappingProxyType({})
    """By name, of what stands beside the weights in `residual_base`."""


def write_weights(
    directory: Path,
    request: CheckpointRequest,
    start: Start,
    finished_files: Path,
    checkpointer: Checkpointer,
    world: World,
) -> Fingerprints:
    """Write adapters by rank 0, `factors/` by their owners, the residual base's files shared out; a collective.

    finished_files: where residual files are kept for another run of the same work, should this one be interrupted.
    Raises Preempted, on all ranks, when one was asked to stop.
    """
    layout, factors = Layout.of(request, start.targets), start.factors
    with world.together():
        if world.is_main:
            for name in layout.directories:
                (directory / name).mkdir()
    magnitudes = None
    if layout.config.lora.use_dora:
        magnitudes = shared_magnitudes(layout, request.base.index, factors, world)
    of_main: tuple[str, dict[str, str]] = "", {}
    with world.together():
        if world.is_main:
            adapter = write_adapters(
                directory,
                layout,
                start.lora,
                lambda target: factors[target.name],
                request.base.index,
                None if magnitudes is None else lambda target, A_RN, B_MR: magnitudes[target.name],
            )
            of_main = adapter, layout.digest_model_files(request.base.directory)
    adapter, model_files = world.of_main(of_main)
    factors_fingerprint = None
    if start.gradients is not None:
        factors_fingerprint = write_factors(directory / FACTORS, start.gradients.owned, world)
    if RESIDUAL_BASE in layout.directories:
        of_models = _write_residual(directory, request, layout, finished_files, checkpointer, world)
    else:
        of_models = _digest_base(request.base.index, world)
    return of_models._replace(adapter=adapter, factors=factors_fingerprint, model_files=model_files)


def _digest_base(index: dict[str, TensorSlot], world: World) -> Fingerprints:
    """The fingerprint of a base that no residual is made of; a collective, ranks share it."""
    share = shares(index, lambda key: index[key].num_bytes, world.size)[world.rank]
    digests: dict[str, list[TensorDigest]] = {}
    num_bytes = sum(index[key].num_bytes for key in share)
    with world.together(), phase("write", num_bytes, "B", shown=world.is_main) as progress:
        digests = {key: [digest] for key, digest in digest_base(index, share, progress.advance).items()}
    return _fingerprints(digests, world)


def _write_residual(
    directory: Path,
    request: CheckpointRequest,
    layout: Layout,
    finished_files: Path,
    checkpointer: Checkpointer,
    world: World,
) -> Fingerprints:
    """Write this rank's share of the residual base, or take what an earlier run of the same work has finished."""
    files, into = layout.residual_files, directory / RESIDUAL_BASE
    adapter_digest, kept = "", []
    with world.together():
        if world.is_main:
            adapter_digest = sha256_of(directory / LORAGA_INIT / ADAPTER_WEIGHTS)
    finished = FinishedFiles(finished_files, {**checkpointer.work, "adapter": world.of_main(adapter_digest)})
    with world.together():
        if world.is_main:
            kept = finished.prune(files)
    kept = world.of_main(kept)
    share = shares(files, lambda file: 0 if file.name in kept else file.num_bytes, world.size)[world.rank]
    digests: dict[str, Sequence[TensorDigest]] = {}
    with world.together():
        adapter = AdapterFile(directory / LORAGA_INIT)
        with phase("write", sum(file.num_bytes for file in share), "B", shown=world.is_main) as progress:
            for file in share:
                checkpointer.leave_here_if_asked()
                written = finished.take(file, into)
                if written is None:
                    index = request.base.index
                    written = write_residual_file(file, index, layout.targets, adapter.factors, into, progress.advance)
                    finished.keep(file, into, written)
                else:
                    progress.advance(file.num_bytes)
                digests |= written
    fingerprints = _fingerprints(digests, world)
    with world.together():
        if world.is_main:
            finish_residual_base(request.base.directory, into, files, layout.config.output.residual_dtype)
    return fingerprints


def _fingerprints(digests: Mapping[str, Sequence[TensorDigest]], world: World) -> Fingerprints:
    """Of all ranks' tensors, each with the base's digest, and the residual's where it has one; a collective."""
    everyone = {
        key: [TensorDigest.of_json(parts) for parts in found]
        for share in world.all_json(digests)
        for key, found in share.items()
    }
    base, *residual = (
        fingerprint(dict(zip(everyone, digests, strict=True))) for digests in zip(*everyone.values(), strict=True)
    )
    return Fingerprints(base, residual[0] if residual else None)


def make_report(
    request: CheckpointRequest,
    start: Start,
    fingerprints: Fingerprints,
    seconds: Mapping[str, float],
    peaks: tuple[int, int],
    world: World,
) -> Report:
    """What there is to say of a run; a collective. peaks: bytes on this rank, measured and planned."""
    per_rank = world.all_json(list(peaks))
    config, targets = (request if start.step is None else request.with_step(start.step.length)).config, start.reports
    of_data: dict[str, Any] = {}
    if start.gradients is not None:
        assert request.data is not None, "gradients are of data"
        found = start.gradients.data
        of_data = {
            "loss": request.data.loss,
            "data_fingerprint": request.data_fingerprints[found.num_samples - 1],
            "engine": config.gradient.engine,
            "order": start.gradients.order.name,
            "order_reason": start.gradients.order.why,
            "calibration_bytes_read": start.gradients.num_bytes_read or None,
            "refine_passes": found.refine_passes,
            "num_sequences": found.num_samples,
            "num_supervised_tokens": found.num_supervised_tokens,
            "stopped_by": _stopped_by(request, found),
            "split_half_cosine": _median_cosine(targets),
            "mean_loss": found.mean_loss,
        }
    return Report(
        schema_version=SCHEMA_VERSION,
        config=config,
        base_fingerprint=fingerprints.base,
        residual_fingerprint=fingerprints.residual,
        adapter_fingerprint=fingerprints.adapter,
        factors_fingerprint=fingerprints.factors,
        model_files=dict(fingerprints.model_files),
        base_quantization=(request.base.quantization or {}).get("quant_method"),
        versions=versions(),
        world_size=world.size,
        device=world.device_name,
        seconds=dict(seconds),
        peak_bytes_per_rank=[peak for peak, _ in per_rank],
        planned_peak_bytes_per_rank=[planned for _, planned in per_rank],
        state_bytes_per_rank=0 if start.gradients is None else start.gradients.state_bytes_per_rank,
        targets=targets,
        rank_budget=SpentBudget.of(config.init, start.targets),
        saved_parameters=request.saved_parameters,
        step=start.step,
        identity_check=start.identity_check,
        coverage=request.coverage,
        left_out=list(request.left_out),
        cautions=start.cautions,
        warnings=find_warnings(
            config.init,
            targets,
            stopped_by=of_data.get("stopped_by"),
            refine_passes=of_data.get("refine_passes"),
            identity=None if config.output.residual_dtype == "float32" else start.identity_check,
            left_out=request.left_out,
            cautions=start.cautions,
        ),
        **of_data,
    )


def _stopped_by(request: CheckpointRequest, used: DataUsed) -> str:
    """What ended the calibration data: `target_cosine`, `sample_limit` or `max_samples`, or that there was no more."""
    if used.reached_target:
        return "target_cosine"
    wanted = request.config.calibration
    num_apart = 0 if request.step_data is None else request.step_data.num_samples
    if len(request.data_fingerprints) + num_apart < wanted.most_samples:
        return "data"
    return "sample_limit" if wanted.max_samples == "auto" else "max_samples"


def _median_cosine(targets: Mapping[str, TargetReport]) -> float | None:
    """Split-half cosine of the median target; None where there was a single microbatch."""
    known = [target.split_half_cosine for target in targets.values() if target.split_half_cosine is not None]
    return statistics.median(known) if known else None


def finish_directory(directory: Path, report: Report, world: World) -> str:
    """The text files, the page, the checksums, and the verification of it all; returns what was verified.

    A collective: ranks share the reading. Raises RunError when a file cannot be written, VerificationError when the
    directory does not verify.
    """
    output = report.config.output.model_copy(update={"overwrite": False})  # wanted once, not of who copies the file
    report = report.model_copy(update={"config": report.config.model_copy(update={"output": output})})
    with world.together():
        if world.is_main:
            weights = sorted(directory.rglob("*.safetensors"))
            written_ns = {path.relative_to(directory).as_posix(): path.stat().st_mtime_ns for path in weights}
            report = report.model_copy(update={"weights_written_ns": written_ns})
            report.write(directory / REPORT)
            write_text(directory / RESOLVED_CONFIG, dump(report.config.model_dump()), "write: ")
            write_text(directory / README, readme(report), "write: ")
            write_report_page(directory, report)
    write_checksums(directory, world)
    with phase("verify", bytes_to_verify(directory) // world.size, "B", shown=world.is_main) as progress:
        result = verify(directory, world=world, on_progress=progress.advance)
    with world.together():
        if not result.ok:
            raise VerificationError(f"verify: {'; '.join(result.problems[:5])}")
    if result.max_rounding_units is None:
        return f"{result.num_targets} targets"
    return f"{result.num_targets} targets, W - (W_res + s*B0*A0) within {result.max_rounding_units:.2f} of one rounding"


def shared_magnitudes(
    layout: Layout, base: Mapping[str, TensorSlot], factors: Mapping[str, LoraFactors], world: World
) -> dict[str, Tensor]:
    """DoRA's magnitudes (M,) of every target on rank 0, each rank having read its share of the weights; a collective.

    factors: of every target, on rank 0. Raises UserError, on all ranks, for a weight that DoRA cannot divide by.
    """
    changes_base = SCHEMES[layout.config.init.scheme].changes_base
    dealt = shares(layout.targets, lambda target: base[target.weight_key].num_bytes, world.size)
    owners = {target.name: rank for rank, share in enumerate(dealt) for target in share}
    mine: dict[str, tuple[Tensor, Tensor]] = {}
    for target in () if changes_base else layout.targets:  # on another base the norms are W's alone
        A_RN = torch.empty(target.r, target.N, device=world.device)
        B_MR = torch.empty(target.M, target.r, device=world.device)
        if world.is_main:
            A_RN.copy_(factors[target.name].A_RN)
            B_MR.copy_(factors[target.name].B_MR)
        world.broadcast_(A_RN, 0)
        world.broadcast_(B_MR, 0)
        if owners[target.name] == world.rank:
            mine[target.name] = A_RN.cpu(), B_MR.cpu()
    computed: dict[str, Tensor] = {}
    with world.together():
        for target in dealt[world.rank]:
            norms_M = start_magnitudes(base, target, None if changes_base else mine[target.name])
            computed[target.name] = norms_M.float()
    found: dict[str, Tensor] = {}
    for target in layout.targets:
        magnitudes_M = torch.empty(target.M, device=world.device)
        if target.name in computed:
            magnitudes_M.copy_(computed[target.name])
        world.broadcast_(magnitudes_M, owners[target.name])
        if world.is_main:
            found[target.name] = magnitudes_M.cpu()
    return found


def write_adapters(
    directory: Path,
    layout: Layout,
    lora: LoraSection,
    factors: Callable[[Target], LoraFactors],
    base: Mapping[str, TensorSlot],
    magnitudes: Callable[[Target, Tensor, Tensor], Tensor] | None,
) -> str:
    """Write `loraga_init` with the given A0, B0, asked for once per target, and, if it belongs on another base than the
    original, `loraga_offset` with the stored A0, -B0.

    lora: the config's, with the ranks and alphas of the targets. base: the checkpoint, for `modules_to_save`.
    magnitudes: DoRA's, as `write_adapter` takes them; None where the adapter is none.
    Returns the fingerprint of `loraga_init`.
    """
    saved = {name: base[key] for name, key in layout.saved_parameters.items()}
    write_adapter(
        directory / LORAGA_INIT,
        layout.lora_config(LORAGA_INIT, lora),
        layout.targets,
        factors,
        magnitudes=magnitudes,
        saved=saved,
    )
    stored = AdapterFile(directory / LORAGA_INIT)
    if LORAGA_OFFSET in layout.directories:
        of_original = layout.lora_config(LORAGA_OFFSET, lora)
        write_adapter(
            directory / LORAGA_OFFSET, of_original, layout.targets, stored.factors, negate_b=True, saved=saved
        )
    return adapter_fingerprint(stored)
