"""Everything a run knows before it allocates a weight: base, data, targets, plan. All of the user's mistakes that can
show here do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraga_dist.artifacts.residual import (
    PlannedFile,
    factor_dtype,
    plan_residual_files,
    require_targets,
    writes_residual,
)
from loraga_dist.config import InitConfig
from loraga_dist.data.samples import (
    Sample,
    SampleDeal,
    fingerprints,
    load_samples,
    padding_token_id,
)
from loraga_dist.errors import UserError
from loraga_dist.files.safetensors_io import TensorSlot
from loraga_dist.files.staging import check_destination
from loraga_dist.model.base import BaseModel, find_base_model
from loraga_dist.model.plan import Plan, make_plan
from loraga_dist.model.rank_budget import planned_targets
from loraga_dist.model.shape import ModelShape
from loraga_dist.model.targets import Target, meta_copy, select_targets
from loraga_dist.publish.hub import check_hub_access
from loraga_dist.publish.tracking import check_trackers
from loraga_dist.ranks.world import World
from loraga_dist.schemes import SCHEMES
from loraga_dist.sharding.zero3 import read_deepspeed_config


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of `loraga-dist init`, understood and checked."""

    config: InitConfig
    """The request with absolute paths and the commit of a hub's model: right from any directory, at any time."""
    destination: Path
    base: BaseModel
    slots: dict[str, TensorSlot] | None
    """The checkpoint's tensors by parameter name; None where transformers has to convert them."""
    shape: ModelShape
    plan: Plan
    targets: list[Target]
    """As planned: with a rank budget, at their largest ranks until `with_ranks`."""
    saved_parameters: dict[str, str]
    """Checkpoint keys of the parameters that `modules_to_save` copies into the adapter."""
    residual_files: list[PlannedFile]
    """Planned whatever `output.residual_base` says: ranks share the digests of the base by the same files."""
    residual_dtype: str
    deal: SampleDeal | None
    """None where the scheme takes no gradient and no data is named."""
    data_fingerprints: list[str]
    """Of the first 1, 2, ... samples; a run need not use them all, and there may be none."""
    output_bytes: int

    @property
    def data_fingerprint(self) -> str | None:
        """Of all samples."""
        return self.data_fingerprints[-1] if self.data_fingerprints else None

    def with_ranks(self, targets: Sequence[Target]) -> Job:
        """The same job once it is known which ranks the targets, in the same order, have got."""
        settled = [
            dataclasses.replace(planned, r=target.r, lora_alpha=target.lora_alpha, scaling=target.scaling)
            for planned, target in zip(self.targets, targets, strict=True)
        ]
        return dataclasses.replace(self, targets=settled)

    def storage_dtype(self, target: Target) -> torch.dtype:
        """What A0 and B0 of a target are rounded to."""
        return factor_dtype(self.base.dtype, self.base.index[target.weight_key].dtype, self.residual_dtype)


def prepare(config: InitConfig, world: World) -> Job:
    """Check the whole request against files, model and data. No collectives; raises UserError.

    Rank 0 asks the hub for access where that is wanted.
    """
    read_deepspeed_config(config.deepspeed)
    destination = check_destination(config.output, _local_inputs(config))
    if config.output.push_residual_base and not writes_residual(config):
        raise UserError("output.push_residual_base", True, f"{config.init.scheme} has no residual_base; write false")
    if world.is_main:
        check_trackers(config.output)
        check_hub_access(config.output)
    base = find_base_model(config.model, config.lora.task_type, world.device)
    if base.directory.resolve().is_relative_to(destination):
        raise UserError("output.dir", config.output.dir, "holds the base model; write another directory")
    scheme = SCHEMES[config.init.scheme]
    try:
        meta_model = meta_copy(base.model_class, base.config)
    except (ValueError, ImportError) as error:
        raise UserError("model.attn_implementation", config.model.attn_implementation, f"{error}") from error
    slots = base.slots_of(meta_model)
    shape = ModelShape.of(meta_model, base.dtype)
    selection = select_targets(
        meta_model,
        config.lora,
        scheme.num_triplets,
        any_rank=config.init.rank_budget is not None,
        weight_key=base.weight_keys,
    )
    targets = planned_targets(selection.targets, config.lora, config.init)
    require_targets(base.index, targets)
    deal = None
    if scheme.source == "gradient" or config.calibration.names_data:
        deal = _deal(config, base, world)
    residual_files = plan_residual_files(base.index, config.output.residual_dtype)
    plan = make_plan(targets, config.gradient, scheme, world.size)
    saved_parameters = {name: base.weight_keys(name) for name in selection.saved_parameters}
    saved = [base.index[key] for key in saved_parameters.values()]
    return Job(
        config=_resolved(config, base, destination),
        destination=destination,
        base=base,
        slots=slots,
        shape=shape,
        plan=plan,
        targets=targets,
        saved_parameters=saved_parameters,
        residual_files=residual_files,
        residual_dtype=config.output.residual_dtype,
        deal=deal,
        data_fingerprints=[] if deal is None else fingerprints(deal.samples),
        output_bytes=_output_bytes(config, plan, residual_files, saved),
    )


def _deal(config: InitConfig, base: BaseModel, world: World) -> SampleDeal:
    tokenizer = _load_tokenizer(base.directory, config)
    samples = load_samples(
        config.calibration,
        tokenizer,
        task_type=config.lora.task_type,
        max_positions=base.max_positions,
        num_labels=getattr(base.config, "num_labels", None),
    )
    _check_token_ids(config, base, samples)
    return SampleDeal(
        samples=samples,
        rank=world.rank,
        world_size=world.size,
        per_device_batch_size=config.calibration.per_device_batch_size,
        pad_token_id=_padding(config, base, tokenizer),
    )


def _resolved(config: InitConfig, base: BaseModel, destination: Path) -> InitConfig:
    is_local = Path(config.model.name_or_path).is_dir()
    deepspeed = config.deepspeed
    if isinstance(deepspeed, dict):  # a training JSON may hold keys of services, and reports are shown around
        deepspeed = {key: value for key, value in deepspeed.items() if key == "zero_optimization"}
    elif deepspeed is not None:
        deepspeed = _absolute(deepspeed)
    model = {"name_or_path": str(base.directory.resolve())} if is_local else {"revision": base.directory.name}
    calibration = config.calibration
    if calibration.dataset_name is None:  # else they lie in that dataset
        calibration = calibration.model_copy(update={"data_files": _absolute(calibration.data_files)})
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "calibration": calibration,
            "output": config.output.model_copy(update={"dir": str(destination)}),
            "deepspeed": deepspeed,
        }
    )


def _local_inputs(config: InitConfig) -> list[Path]:
    """Data and settings that an output must not take the place of; the model is found later."""
    data_files, dataset_name = config.calibration.data_files or [], config.calibration.dataset_name
    named = [*([data_files] if isinstance(data_files, str) else data_files)]
    named += [name for name in (config.deepspeed, dataset_name) if isinstance(name, str) and Path(name).exists()]
    return [Path(name) for name in named]


def _absolute(paths: Any) -> Any:
    """The same paths from any working directory; URLs as they are."""
    if isinstance(paths, list):
        return [_absolute(path) for path in paths]
    return paths if paths is None or "://" in paths else str(Path(paths).resolve())


def _padding(config: InitConfig, base: BaseModel, tokenizer: Any) -> int:
    """The id to pad with. Classifiers on decoders find the last token by the model's own padding id."""
    if config.lora.task_type != "SEQ_CLS":
        return padding_token_id(tokenizer)
    own = getattr(base.config, "pad_token_id", None)
    if own is None and config.calibration.per_device_batch_size > 1:
        raise UserError(
            "calibration.per_device_batch_size",
            config.calibration.per_device_batch_size,
            "the model's config has no pad_token_id, which a classifier needs for batches; write 1, or set it there",
        )
    return padding_token_id(tokenizer) if own is None else own


def _check_token_ids(config: InitConfig, base: BaseModel, samples: Sequence[Sample]) -> None:
    rows = getattr(base.config.get_text_config(), "vocab_size", None)
    largest = max(max(sample.inputs["input_ids"]) for sample in samples)
    if isinstance(rows, int) and largest >= rows:
        raise UserError(
            "model.name_or_path",
            config.model.name_or_path,
            f"its tokenizer makes token {largest}, the model has {rows} embeddings; write one whose tokenizer fits",
        )


def agree_on_inputs(job: Job, config: InitConfig, world: World) -> None:
    """Raise UserError on all ranks unless they all read the same data; a collective."""
    everyone = world.all_texts(job.data_fingerprint or "")
    others = [rank for rank, found in enumerate(everyone) if found != everyone[0]]
    with world.together():
        if others:
            calibration = config.calibration
            raise UserError(
                "calibration.data_files",
                calibration.data_files or calibration.dataset_name,
                f"ranks {others} read other data than rank 0; write a path under which all nodes see the same files",
            )


def _load_tokenizer(directory: Path, config: InitConfig) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            "model.name_or_path", config.model.name_or_path, f"its tokenizer does not load: {error}"
        ) from error


def _output_bytes(
    config: InitConfig, plan: Plan, residual_files: Sequence[PlannedFile], saved: Sequence[TensorSlot]
) -> int:
    parameters = sum(target.r * (target.M + target.N) for target in plan.targets)
    factors_of_adapter = 4 * min(parameters, config.init.rank_budget or parameters)
    adapters = (2 if plan.scheme.changes_base else 1) * (factors_of_adapter + sum(slot.num_bytes for slot in saved))
    matrices = list(plan.matrices.values())
    factors = sum(4 * matrix.width * (matrix.M + matrix.N + 1) for matrix in matrices)
    residual = sum(file.num_bytes for file in residual_files) if writes_residual(config) else 0
    return adapters + factors + residual
