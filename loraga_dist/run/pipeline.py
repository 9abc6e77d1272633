"""The whole story: understand -> load -> calibrate -> factorize -> place -> write -> verify.

`run` is the command line's, `initialize` is for training scripts; what they share is `start.in_place.start_in_place`.
"""

from __future__ import annotations

import importlib
import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraga_dist.artifacts.layout import Layout, strangers
from loraga_dist.artifacts.names import MODEL_CONFIG, RESIDUAL_BASE
from loraga_dist.artifacts.report import Report
from loraga_dist.config import InitConfig, MethodConfig, parse_config, require_filled_in
from loraga_dist.data.formats import clock_at
from loraga_dist.data.microbatches import Microbatch
from loraga_dist.engines.home import pinned_bytes
from loraga_dist.engines.product import multiplies_bfloat16
from loraga_dist.errors import LoragaError, RunError, UserError, VerificationError
from loraga_dist.files.checkpoint import CheckpointStore
from loraga_dist.files.staging import (
    StagedDirectory,
    existing_parent,
    free_place,
    require_writable,
)
from loraga_dist.forecast.advice import refuse_what_cannot_fit
from loraga_dist.forecast.forecaster import Forecaster
from loraga_dist.forecast.report import PlanReport
from loraga_dist.forecast.text import plan_line, print_plan
from loraga_dist.forecast.ways import Room
from loraga_dist.gradients.checkpointer import BEGAN, ORDER, Checkpointer
from loraga_dist.gradients.kept import SHARE, FreeSpace, Keeping, choose_keeping
from loraga_dist.model.base import base_identity
from loraga_dist.publish.hub import check_hub_access, push_output
from loraga_dist.publish.tracking import check_trackers, track
from loraga_dist.ranks.memory import PeakMemory, free_bytes, free_host_bytes, return_freed_memory_at_once
from loraga_dist.ranks.progress import Clock, phase
from loraga_dist.ranks.stop import StopRequest
from loraga_dist.ranks.words import say
from loraga_dist.ranks.world import World
from loraga_dist.request.data import require_same_data
from loraga_dist.request.request import CheckpointRequest, Request, understand, understand_model
from loraga_dist.run.writing import finish_directory, make_report, write_weights
from loraga_dist.schemes import SCHEMES
from loraga_dist.sharding.base import Sharding
from loraga_dist.sharding.open import open_sharding, sharding_of
from loraga_dist.start.in_place import Start, beside_a_script, start_in_place


def run(config: InitConfig, world: World, stop: StopRequest) -> tuple[Report, str]:
    """Make a start of a checkpoint and data, and write it to a verified output directory. Every rank calls this.

    1. Understand the request; refuse what cannot fit.
    2. Stage the output directory; look for what an interrupted run of the same work left.
    3. Load the model and turn it into its start.
    4. Write weights and texts, verify all of it, and put it in place.
    5. Push and track, where that is asked for.

    Returns the report and what was verified. Raises UserError before weights are allocated wherever the mistake shows
    by then, RunError when the run fails; the output directory appears only when everything in it has been verified.
    """
    clock = Clock()
    return_freed_memory_at_once()
    _import_libraries()
    with clock.phase("load"):
        request, staged = _prepare(config, world, clock)
    request, forecaster = _fitting(request, world)
    with world.together():
        planned = forecaster.memory(world.rank, forecaster.largest_microbatch)
        refuse_what_cannot_fit(planned, forecaster, world)
        if world.is_main:
            _say_what_comes(request, forecaster, clock, world)
    config, destination = request.config, staged.destination
    num_bytes = _bytes_to_write(request, forecaster)
    finished_files = staged.checkpoint_path / RESIDUAL_BASE
    stop.hold()  # from here on there is something to tidy up, and soon to save
    with PeakMemory(world.device) as memory:  # above what understanding took, as the plan is
        staged.create(num_bytes)
        try:
            checkpointer = _checkpointer(request, clock, staged.checkpoint_path, stop, world)
            if config.resume == "auto":
                checkpointer.look()
            else:
                checkpointer.start_over()
            model, sharding = _load(request, clock, world, from_disk=forecaster.way.from_disk)
            start = start_in_place(
                model, request, sharding=sharding, checkpointer=checkpointer, keeping=forecaster.way.all_keeping
            )
            checkpointer.leave_if_asked()
            with clock.phase("write"):
                fingerprints = write_weights(staged.path, request, start, finished_files, checkpointer, world)
                checkpointer.leave_if_asked()
            peaks = memory.peak_bytes, planned.peak_bytes
            report = make_report(request, start, fingerprints, clock.seconds, peaks, world)
            verified = finish_directory(staged.path, report, world)
            with world.together():
                if world.is_main:
                    now = base_identity(request.base.directory, request.base.index)
                    checkpointer.require_same_base(request.base.identity, now)
                    staged.commit()
            checkpointer.done()
        except BaseException as error:
            if world.is_main:
                staged.discard()
                if isinstance(error, VerificationError):
                    shutil.rmtree(finished_files, ignore_errors=True)  # one of them may be what does not verify
                has_failed = isinstance(error, LoragaError) and error.exit_code == RunError.exit_code
                if has_failed and CheckpointStore(staged.checkpoint_path, world).holds_work:
                    error.add_note(f"the same command goes on from the checkpoint in {staged.checkpoint_path}")
            raise
    stop.listen_no_more()  # nothing is left to save
    try:
        push_output(destination, report, world)
        with world.together():
            if world.is_main:
                track(destination, report)
    finally:
        staged.drop_lock()
    return report, verified


def dry_run(config: InitConfig, world: World, stop: StopRequest) -> None:
    """Check all that `run` does before it loads the model, then print the plan on rank 0; nothing is written."""
    clock = Clock()
    request, staged = _prepare(config, world, clock)
    request, forecaster = _fitting(request, world)
    with world.together():
        refuse_what_cannot_fit(forecaster.memory(world.rank, forecaster.largest_microbatch), forecaster, world)
        if world.is_main:
            staged.require_ours()
            staged.require_space(_bytes_to_write(request, forecaster))
            CheckpointStore(staged.checkpoint_path, World.alone()).require_ours()
    if config.resume == "auto":
        _checkpointer(request, clock, staged.checkpoint_path, stop, world).look()
    if world.is_main:
        print_plan(_plan_report(request, forecaster))


def initialize(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any] | Microbatch] | None,
    config: MethodConfig | Mapping[str, Any],
    *,
    max_batches: int | None = None,
) -> Start:
    """Turn a transformers model into its LoRA-GA start, or another scheme's, in place, from inside a training script.

    Call it on every rank, before the training `deepspeed.initialize`, and train `Start.model`. The model is either
    partitioned by ZeRO-3 (loaded under `HfDeepSpeedConfig` or `deepspeed.zero.Init`) or whole in a single process.

    dataloader: this rank's own batches, dicts of tensors with `input_ids` and `labels` (-100: no loss); read once. Of
        preference and policy data, the microbatches that a `SampleSharder` makes.
        Schemes that take no gradient read one batch, to compare logits, or do without: None.
    config: the sections `lora`, `init`, `gradient` and `deepspeed` of the configuration.
    max_batches: read no more than these from the dataloader.

    The model is taken in its own dtype: a surrounding `torch.autocast`, `torch.no_grad`, default dtype or device, and
    products of float32 in fewer bits change nothing.

    Raises UserError for input it cannot work with, before the model is touched: an optimizer that already holds the
    parameters, NVMe-offloaded or hpZ shards, several ranks with an unsharded model; RunError when calibration fails,
    which leaves the model as it was.
    """
    if not isinstance(config, MethodConfig):
        config = parse_config(MethodConfig, dict(config))
    world = World.current()
    with world.together():
        sharding = sharding_of(model, world, config.deepspeed, "loraga_dist.initialize")
        if config.lora.use_dora and sharding.is_sharded:
            problem = "takes norms of whole weights, which no rank of ZeRO-3 holds"
            raise UserError("lora.use_dora", True, f"{problem}; write false, or make the start with loraga-dist init")
    with beside_a_script(model, sharding.world.device):
        request = understand_model(
            model, dataloader, config, sharding.world, is_partitioned=sharding.is_sharded, max_batches=max_batches
        )
        for left_out in request.left_out if sharding.world.is_main else ():
            say(f"warning: {left_out.text}")
        keeping = _keeping_beside(model, request, sharding.world)
        start = start_in_place(model, request, sharding=sharding, keeping=keeping)
    for line in start.cautions if sharding.world.is_main else ():
        say(f"warning: {line}")
    return start


def _prepare(config: InitConfig, world: World, clock: Clock) -> tuple[CheckpointRequest, StagedDirectory]:
    """Understand the request and check it against files, model, data and services. Raises UserError; a collective.

    Returns the place of its output, too, where nothing has been made yet.

    clock: set to when the work began, if an earlier run did.
    """
    with world.together():
        require_filled_in(config)
        destination = free_place(
            Path(config.output.dir),
            "output.dir",
            strangers=strangers if world.is_main else lambda _: [],  # one rank reads for all
            overwrite=config.output.overwrite,
            inputs=_local_inputs(config),
        )
        if config.gradient.activations_dir is not None:
            require_writable(Path(config.gradient.activations_dir), "gradient.activations_dir")
        if config.output.push_residual_base and not SCHEMES[config.init.scheme].changes_base:
            problem = f"{config.init.scheme} has no residual_base; write false"
            raise UserError("output.push_residual_base", True, problem)
        if world.is_main:
            check_trackers(config.output)
            check_hub_access(config.output)
    staged = StagedDirectory(destination, world)
    store = CheckpointStore(staged.checkpoint_path, world)
    began, order = (store.peek(key) if config.resume == "auto" else None for key in (BEGAN, ORDER))
    clock.began = _began(began, world)
    with world.together(), clock_at(clock.began):
        request = understand(config, world, order=order)
        if request.base.directory.resolve().is_relative_to(staged.destination):
            raise UserError("output.dir", config.output.dir, "holds the base model; write another directory")
    require_same_data(config, request.data_fingerprint, world)
    return request, staged


def _began(saved: Any, world: World) -> datetime:
    """When the work began: now, by rank 0, or when the run to go on from did. Another would make other data."""
    now = world.of_main(datetime.now().isoformat())
    try:
        return datetime.fromisoformat(saved or now)
    except (TypeError, ValueError):  # another version's, which is refused when it is read
        return datetime.fromisoformat(now)


def _local_inputs(config: InitConfig) -> list[Path]:
    """Data and settings that an output must not take the place of; the model is found later."""
    data_files, dataset_name = config.calibration.data_files or [], config.calibration.dataset_name
    named = [*([data_files] if isinstance(data_files, str) else data_files)]
    named += [name for name in (config.deepspeed, dataset_name) if isinstance(name, str) and Path(name).exists()]
    return [Path(name) for name in named]


def _fitting(request: CheckpointRequest, world: World) -> tuple[CheckpointRequest, Forecaster]:
    """The request as it goes the cheapest way through the model that has room on all ranks; a collective."""
    forecaster, on_host = Forecaster.of(request, world), world.device.type == "cpu"
    with world.together():
        free_on_disk = shutil.disk_usage(existing_parent(forecaster.files_directory)).free
    room = Room(
        device_bytes=free_bytes(world.device, world.ranks_on_node),
        host_bytes=None if on_host else free_host_bytes() // world.ranks_on_node,
        files_bytes=free_on_disk // world.ranks_on_node,
    )
    largest = max(world.all_json(forecaster.largest_microbatch), key=lambda shapes: math.prod(shapes["input_ids"]))
    room = Room.least(world.all_json(vars(room)))
    with world.together():
        forecaster = forecaster.fitting(room, {name: tuple(shape) for name, shape in largest.items()})
    return replace(request, plan=forecaster.plan), forecaster


def _keeping_beside(model: nn.Module, request: Request, world: World) -> Keeping:
    """What goes through the blocks together of a training script's model, by what the host has left; a collective."""
    data, blocks, gradient = request.data, request.plan.order.blocks, request.config.gradient
    if data is None or blocks is None:
        return Keeping()
    microbatches = data.microbatches(0, data.num_samples, 0)
    most_tokens = max(microbatch.inputs["input_ids"].numel() for microbatch in microbatches)
    config: Any = model.config
    hidden = most_tokens * config.get_text_config().hidden_size * next(model.parameters()).dtype.itemsize
    directory = Path(gradient.activations_dir or tempfile.gettempdir())
    on_device = None if world.device.type == "cpu" else SHARE * free_bytes(world.device, world.ranks_on_node)
    with world.together():
        free = FreeSpace(
            memory_bytes=free_host_bytes() / world.ranks_on_node,
            files_bytes=shutil.disk_usage(existing_parent(directory)).free / world.ranks_on_node,
            device_bytes=on_device,
            directory=directory,
        )
        keeping = choose_keeping(
            kept_bytes=(blocks.count + 1) * (hidden if on_device is None else pinned_bytes(hidden)),
            resident_bytes=2 * hidden,
            between_bytes=2 * hidden,
            num_microbatches=len(microbatches),
            free=free,
            gradient=gradient,
        )
    chunks = world.all_json(keeping.chunk_microbatches)
    return replace(keeping, chunk_microbatches=min((each for each in chunks if each is not None), default=None))


def _plan_report(request: CheckpointRequest, forecaster: Forecaster) -> PlanReport:
    report, data = PlanReport(forecaster=forecaster, shapes=forecaster.largest_microbatch), request.data
    return report if data is None else replace(report, num_sequences=data.num_samples, num_tokens=data.num_tokens)


def _bytes_to_write(request: CheckpointRequest, forecaster: Forecaster) -> int:
    """On the disk of the output, at least: with one state, which a stop saves, and not all that a long run keeps."""
    output = Layout.of(request).num_bytes
    return sum(output.values()) + _plan_report(request, forecaster).course.checkpoint_bytes(output, num_states=1)


def _say_what_comes(request: CheckpointRequest, forecaster: Forecaster, clock: Clock, world: World) -> None:
    read = f"{request.data.num_samples} sequences, " if request.data else ""
    ranks = f"{world.size} rank{'s' if world.size > 1 else ''} on {world.device_name}"
    say(f"read: {read}{len(request.targets)} targets in {clock.seconds['load']:.1f} s; {ranks}")
    say(f"adapters: {request.coverage.text}")
    if request.plan.groups:
        say(f"plan: {plan_line(_plan_report(request, forecaster))}")
        if forecaster.on_host and request.base.dtype == torch.bfloat16 and not multiplies_bfloat16():
            say(
                "warning: this processor has no units for bfloat16, which takes it tens of times as long as float32; "
                "with model.dtype float32 it computes with the same weights in twice the memory"
            )


def _load(request: CheckpointRequest, clock: Clock, world: World, *, from_disk: bool) -> tuple[nn.Module, Sharding]:
    """The model, and what holds it; a collective."""
    sharding = open_sharding(world, request.config.deepspeed, from_disk=from_disk)
    with clock.phase("load"), phase("load weights", request.shape.num_bytes, "B", shown=world.is_main, counted=False):
        return sharding.load(request.base, request.stored.as_it_is), sharding


def _checkpointer(
    request: CheckpointRequest, clock: Clock, directory: Path, stop: StopRequest, world: World
) -> Checkpointer:
    config, identity = request.config, request.base.identity
    # of the other files, the tokenizer's change the data, which is compared itself
    base = {name: identity[name] for name in identity if name in ("weights", MODEL_CONFIG) or name.endswith(".py")}
    work = {  # rank 0's: nodes may hold copies of their own, in other places and with other times
        **config.model_dump(
            mode="json",
            include={"model", "lora", "init", "gradient", "calibration"},
            # where and how many at a time changes nothing but the time
            exclude={"gradient": {"activations_dir", "chunk_microbatches", "checkpointing"}},
        ),
        "base": base,
        "data": request.data_fingerprint,
        "loraga_dist": version("loraga_dist"),
    }
    store, groups = CheckpointStore(directory, world), request.plan.groups
    return Checkpointer(store, world.of_main(work), groups, clock, stop, config.checkpoint_minutes, world)


def _import_libraries() -> None:
    """The large imports of a run, before its memory is measured: code is no part of a rank's share of the model."""
    for name in ("peft", "datasets"):
        with suppress(ImportError):  # where it is needed, its absence is reported
            importlib.import_module(name)
