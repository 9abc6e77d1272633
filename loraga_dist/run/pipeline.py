"""The whole story: prepare -> load -> calibrate -> factorize -> place -> write -> verify.

`run` is the command line's, `initialize` is for training scripts; what they share is `start.start_in_place`.
"""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from loraga_dist.artifacts.names import RESIDUAL_BASE
from loraga_dist.config import InitConfig, MethodConfig, parse_config
from loraga_dist.data.samples import BatchDeal, microbatches_from_batches
from loraga_dist.errors import LoragaError, UserError, VerificationError
from loraga_dist.files.checkpoint import CheckpointStore
from loraga_dist.files.staging import StagedDirectory
from loraga_dist.forecast.forecaster import forecaster_of, largest_microbatch, planned_memory, refuse_what_cannot_fit
from loraga_dist.forecast.report import plan_report, print_plan
from loraga_dist.gradients.calibrate import in_step
from loraga_dist.model.base import DTYPES
from loraga_dist.model.plan import make_plan
from loraga_dist.model.rank_budget import planned_targets
from loraga_dist.model.targets import Target, meta_copy, select_targets
from loraga_dist.publish.hub import push_output
from loraga_dist.publish.tracking import track
from loraga_dist.ranks.memory import PeakMemory, return_freed_memory_at_once
from loraga_dist.ranks.session import StopRequest
from loraga_dist.ranks.world import World
from loraga_dist.request.request import Job, agree_on_inputs, prepare
from loraga_dist.run.finished import num_bytes_kept
from loraga_dist.run.keeper import RunKeeper, base_identity
from loraga_dist.run.writing import finish_directory, make_report, write_weights
from loraga_dist.schemes import SCHEMES, LoraFactors
from loraga_dist.sharding import Sharding, SingleProcess, Zero3
from loraga_dist.sharding.zero3 import is_partitioned, refuse_unsupported_shards
from loraga_dist.start.in_place import Start, start_in_place


def run(config: InitConfig, world: World, stop: StopRequest) -> tuple[dict[str, Any], str]:
    """`loraga-dist init`: from a checkpoint and data to a verified output directory.

    Every rank calls it. Returns the report and what was verified. Raises UserError before weights are
    allocated wherever the mistake shows by then, RunError when the run fails; the output directory appears only when
    everything in it has been verified.
    """
    started = time.monotonic()
    seconds: dict[str, float] = {}
    return_freed_memory_at_once()
    _import_libraries()
    with PeakMemory(world.device) as memory:
        with world.together():
            job = prepare(config, world)
        config = job.config
        agree_on_inputs(job, config, world)
        with world.together():
            planned = planned_memory(job, config, world)
            refuse_what_cannot_fit(planned, job, config, world)
        staged = StagedDirectory(job.destination, world, overwrite=config.output.overwrite)
        finished_files = staged.checkpoint_path / RESIDUAL_BASE
        staged.create(max(0, job.output_bytes - num_bytes_kept(finished_files)))
        try:
            keeper = _keeper(job, staged.checkpoint_path, stop, world)
            sharded = world.size > 1 or config.deepspeed is not None
            sharding = Zero3(world, config.deepspeed) if sharded else SingleProcess(world)
            model = sharding.load(job.base.directory, job.base.model_class, job.base.config, job.base.dtype, job.slots)
            seconds["load"] = time.monotonic() - started
            factors: dict[str, LoraFactors] = {}
            start = start_in_place(
                model,
                job.plan,
                job.deal,
                _without_dora(config),
                sharding=sharding,
                rounding=job.storage_dtype,
                target_cosine=config.calibration.target_cosine if config.calibration.max_samples == "auto" else None,
                keeper=keeper,
                keep=lambda target, made: factors.__setitem__(target.name, made) if world.is_main else None,
            )
            seconds["calibrate"] = 0.0 if start.calibration is None else start.calibration.seconds_calibrate
            seconds["factorize"] = start.seconds_factorize
            job = job.with_ranks([found.target for found in start.targets])
            keeper.leave_if_asked()
            write_started = time.monotonic()
            fingerprints = write_weights(staged.path, job, config, start, factors, finished_files, keeper, world)
            keeper.leave_if_asked()
            seconds["write"] = time.monotonic() - write_started
            seconds["total"] = time.monotonic() - started
            report = make_report(
                job, config, start, fingerprints, seconds, memory.peak_bytes, planned.peak_bytes, world
            )
            verified = finish_directory(staged.path, config, report, world)
            with world.together():
                if world.is_main:
                    staged.commit()
            keeper.done()
        except BaseException as error:
            if world.is_main:
                staged.discard()
                if isinstance(error, VerificationError):
                    shutil.rmtree(finished_files, ignore_errors=True)  # one of them may be what does not verify
                if isinstance(error, LoragaError) and error.exit_code == 3 and staged.checkpoint_path.is_dir():
                    error.add_note(f"the same command goes on from the checkpoint in {staged.checkpoint_path}")
            raise
    stop.listen_no_more()  # nothing is left to save
    push_output(job.destination, report, world)
    with world.together():
        if world.is_main:
            track(job.destination, report)
    return report, verified


def _keeper(job: Job, directory: Path, stop: StopRequest, world: World) -> RunKeeper:
    config = job.config
    work = {
        **config.model_dump(mode="json", include={"model", "lora", "init", "gradient", "calibration"}),
        "base": base_identity(job.base.index),
        "data": job.data_fingerprint,
        "loraga_dist": version("loraga_dist"),
    }
    keeper = RunKeeper(CheckpointStore(directory, world), work, stop, config.checkpoint_minutes, world)
    if config.resume == "auto":
        keeper.look()
    else:
        keeper.start_over()
    return keeper


def dry_run(config: InitConfig, world: World) -> None:
    """`loraga-dist init --dry_run`: everything `run` does before it allocates or writes, then the plan on rank 0."""
    with world.together():
        job = prepare(config, world)
    agree_on_inputs(job, config, world)
    with world.together():
        refuse_what_cannot_fit(planned_memory(job, config, world), job, config, world)
        if world.is_main:
            forecaster, shapes = forecaster_of(job, config, world), largest_microbatch(job)
            num_sequences = None if job.deal is None else job.deal.num_samples
            print_plan(plan_report(forecaster, world.size, shapes=shapes, num_sequences=num_sequences))


def initialize(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]] | None,
    config: MethodConfig | Mapping[str, Any],
    *,
    max_batches: int | None = None,
) -> Start:
    """Turn a transformers model into its LoRA-GA start, or another scheme's, in place, from inside a training script.

    Call it on every rank, before the training `deepspeed.initialize`, and train `Start.model`. The model is either
    partitioned by ZeRO-3 (loaded under `HfDeepSpeedConfig` or `deepspeed.zero.Init`) or whole in a single process.

    dataloader: this rank's own batches, dicts of tensors with `input_ids` and `labels` (-100: no loss); read once.
        Schemes that take no gradient read one batch, to compare logits, or do without: None.
    config: the sections `lora`, `init`, `gradient` and `deepspeed` of the configuration.
    max_batches: read no more than these from the dataloader.

    Raises UserError for input it cannot work with, before the model is touched: an optimizer that already holds the
    parameters, NVMe-offloaded or hpZ shards, several ranks with an unsharded model; RunError when calibration fails.
    """
    if not isinstance(config, MethodConfig):
        config = parse_config(MethodConfig, dict(config))
    world = World.current()
    with world.together():
        sharding = _sharding_of(model, config, world)
        if config.lora.use_dora and sharding.is_sharded:
            problem = "takes norms of whole weights, which no rank of ZeRO-3 holds"
            raise UserError("lora.use_dora", True, f"{problem}; write false, or make the start with loraga-dist init")
        if not hasattr(model, "config") or hasattr(model, "peft_config"):
            raise UserError("model", type(model).__name__, "must be a transformers model without an adapter")
        scheme = SCHEMES[config.init.scheme]
        meta_model, any_rank = meta_copy(type(model), model.config), config.init.rank_budget is not None
        selection = select_targets(meta_model, config.lora, scheme.num_triplets, any_rank=any_rank)
        targets = planned_targets(selection.targets, config.lora, config.init)
        _require_unquantized(model, targets)
        plan = make_plan(targets, config.gradient, scheme, world.size)
        if scheme.source != "gradient":
            max_batches = 1
        elif dataloader is None:
            raise UserError("dataloader", None, f"{scheme.title} takes gradients; give it batches of calibration data")
        microbatches = microbatches_from_batches(
            () if dataloader is None else dataloader, config.lora.task_type, max_batches
        )
    dtype = next(model.parameters()).dtype
    return start_in_place(
        model,
        plan,
        None if dataloader is None else BatchDeal(in_step(microbatches, world)),
        config,
        sharding=sharding,
        rounding=lambda target: dtype,
    )


def _without_dora(config: InitConfig) -> InitConfig:
    """For the model in memory: DoRA starts as the plain adapter does, and would want each weight whole to say so. What
    makes it DoRA are magnitudes in the file."""
    return config.model_copy(update={"lora": config.lora.model_copy(update={"use_dora": False})})


def _import_libraries() -> None:
    """The large imports of a run, before its memory is measured: code is no part of a rank's share of the model."""
    for name in ("peft", "datasets"):
        with suppress(ImportError):  # where it is needed, its absence is reported
            importlib.import_module(name)


def _require_unquantized(model: nn.Module, targets: Sequence[Target]) -> None:
    parameters = dict(model.named_parameters())
    for target in targets:
        weight = parameters.get(target.parameter_name)
        if weight is None or weight.dtype not in DTYPES.values():
            held = "no weight" if weight is None else f"a weight in {str(weight.dtype).removeprefix('torch.')}"
            raise UserError("model", target.name, f"holds {held}; load the model in {', '.join(DTYPES)}")


def _sharding_of(model: nn.Module, config: MethodConfig, world: World) -> Sharding:
    if is_partitioned(model):
        refuse_unsupported_shards(model, "loraga_dist.initialize")
        return Zero3(world, config.deepspeed)
    if world.size > 1:
        raise UserError(
            "model",
            type(model).__name__,
            f"is whole on each of {world.size} ranks; load it under ZeRO-3 (transformers' HfDeepSpeedConfig)",
        )
    return SingleProcess(replace(world, device=next(model.parameters()).device))
