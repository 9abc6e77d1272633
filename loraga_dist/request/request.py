"""What is wanted, understood: settings, targets, plan and data.

Mistakes in settings, model and data show here, before a weight is allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from loraga_dist.config import InitConfig, LoraSection, MethodConfig
from loraga_dist.data.microbatches import (
    BatchSharder,
    Microbatch,
    MicrobatchSharder,
    SampleSharder,
    Sharder,
    in_step,
    kept_apart,
    microbatches_from_batches,
)
from loraga_dist.data.samples import fingerprints, path_keys
from loraga_dist.engines.base import USUAL_AMOUNT, Amount
from loraga_dist.errors import UserError, blame
from loraga_dist.files.safetensors_io import Entries
from loraga_dist.model.base import BaseModel, factor_dtype, find_base_model, model_files
from loraga_dist.model.blocks import Blocks, Order, choose_order, find_blocks, saved_order
from loraga_dist.model.conversion import StoredModel, require_ties, require_whole
from loraga_dist.model.coverage import Coverage
from loraga_dist.model.left_out import LeftOut
from loraga_dist.model.plan import Plan, make_plan
from loraga_dist.model.rank_budget import planned_targets
from loraga_dist.model.selection import Selection, select_targets
from loraga_dist.model.shape import ModelShape, within_positions
from loraga_dist.model.stacks import find_stacks
from loraga_dist.model.targets import Target, meta_copy, require_saved, require_targets
from loraga_dist.model.towers import text_model
from loraga_dist.ranks.world import World
from loraga_dist.request.data import read_data
from loraga_dist.request.refusals import (
    require_alike,
    require_base_left_alone,
    require_classes,
    require_gradients_of_text,
    require_inputs_of_a,
    require_labels,
    require_supervised,
    require_task,
    require_unquantized,
)
from loraga_dist.schemes import SCHEMES, Scheme
from loraga_dist.sharding.settings import Holding, require_usable

MOMENT_TOKENS = 16384
"""What `init.whitening: sampled` sums over, in expectation."""
USUAL_SAMPLES = 256
"""After which the halves of data mostly agree, where `calibration.max_samples` is auto."""

USUAL_LENGTHS = 5
"""That a search for a step tries, each with a forward; 4 at least."""

META_SECONDS = 300
"""To build a model without memory; the largest take a tenth of that."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A start of a model, understood and checked. The same on every rank, but for the rank's own microbatches."""

    config: MethodConfig
    plan: Plan
    """Its targets have the ranks planned for: with a rank budget, the largest they may get."""
    data: MicrobatchSharder | None
    """None only where the scheme takes no gradient."""
    step_data: MicrobatchSharder | None = None
    """What the length of a step is searched on, where it is searched."""
    factor_dtypes: Mapping[str, torch.dtype]
    """What A0 and B0 of every target are rounded to."""
    amount: Amount = USUAL_AMOUNT
    """Of calibration data."""
    coverage: Coverage
    """What of the model the targets are."""
    left_out: Sequence[LeftOut] = ()
    """By `all-linear`."""

    @property
    def scheme(self) -> Scheme:
        return self.plan.scheme

    @property
    def targets(self) -> list[Target]:
        return self.plan.targets

    @property
    def moment_share(self) -> float:
        """Of the tokens, what second moments of inputs are summed over."""
        if self.config.init.whitening != "sampled":
            return 1.0
        return min(1.0, MOMENT_TOKENS / max(1.0, self.num_likely_tokens))

    @property
    def num_likely_tokens(self) -> float:
        """That a calibration takes, as far as can be said before it."""
        return self.amount.num_tokens

    @property
    def target_cosine(self) -> float | None:
        """The median split-half cosine at which calibration has seen enough; None: it takes all data."""
        return None

    def in_model_order(self, why: str, world_size: int) -> Self:
        """The same request for a model that turned out to be no sequence of blocks. Raises UserError, on all ranks."""
        order = Order(blocks=None, why=why)
        require_alike(self.data, order, "data", world_size)
        return replace(self, plan=make_plan(self.targets, self.config, world_size, order, self.amount))

    def with_step(self, length: float) -> Self:
        """The same request with this step."""
        init = self.config.init.model_copy(update={"step": length})
        return replace(self, config=self.config.model_copy(update={"init": init}))

    @property
    def lora_in_memory(self) -> LoraSection:
        """The adapter that the model gets."""
        return self.config.lora


@dataclass(frozen=True, kw_only=True)
class CheckpointRequest(Request):
    """A request for the model of a checkpoint, to be written to a directory."""

    config: InitConfig
    """With absolute paths, the commit of a hub's model and the scheme's gamma: right from anywhere, at any time."""
    base: BaseModel
    stored: StoredModel
    """Where the model's parameters lie in the checkpoint."""
    shape: ModelShape
    blocks: Blocks | None
    """What the model is a sequence of, if it is one."""
    saved_order: Order | None
    """In which a run to go on from went through it."""
    saved_parameters: dict[str, str]
    """Checkpoint keys of the parameters that `modules_to_save` copies into the adapter."""
    entries: Entries
    """Dtypes and shapes of the model's tensors by checkpoint key; by parameter name where there is no checkpoint."""
    data: SampleSharder | None
    step_data: SampleSharder | None = None

    def with_keys(self, **sections: dict[str, Any]) -> Self:
        """The same request with some keys changed, for a plan; its data is as much shorter as it is allowed to be."""
        update = {name: getattr(self.config, name).model_copy(update=keys) for name, keys in sections.items()}
        config = self.config.model_copy(update=update)
        return replace(self, config=config, amount=_amount(config, self.data, self.shape))

    @property
    def target_cosine(self) -> float | None:
        calibration = self.config.calibration
        return calibration.target_cosine if calibration.max_samples == "auto" else None

    @property
    def num_likely_tokens(self) -> float:
        if self.target_cosine is None:
            return self.amount.num_tokens
        num_samples = self.config.calibration.most_samples if self.data is None else self.data.num_samples
        return self.amount.num_tokens * min(1.0, USUAL_SAMPLES / num_samples)

    @property
    def lora_in_memory(self) -> LoraSection:
        """Without DoRA, which starts as the plain adapter does; what makes it DoRA are magnitudes in the file."""
        return self.config.lora.model_copy(update={"use_dora": False})

    @property
    def has_images(self) -> bool:
        return self.data is not None and any(sample.images is not None for sample in self.data.samples)

    @cached_property
    def data_fingerprints(self) -> list[str]:
        """Of the first 1, 2, ... samples; a run need not use them all, and there may be none."""
        return [] if self.data is None else fingerprints(self.data.samples)

    @property
    def data_fingerprint(self) -> str | None:
        """Of all samples."""
        return self.data_fingerprints[-1] if self.data_fingerprints else None


def understand(
    config: InitConfig,
    world: World,
    *,
    needs_weights: bool = True,
    reads_data: bool = True,
    order: Any = None,
) -> CheckpointRequest:
    """Understand a configuration: find the model, choose targets, plan, read the data. No collectives.

    needs_weights: without, a directory may hold a config.json alone, as a forecast may be made of.
    reads_data: without, data and DeepSpeed's settings, which only a run needs, are not looked at.
    order: what a run to go on from has saved of its order.
    Raises UserError for all that does not fit together.
    """
    if reads_data:
        require_usable(config.deepspeed)
    scheme = SCHEMES[config.init.scheme]
    base = find_base_model(config.model, config.lora.task_type, world.device, needs_weights=needs_weights)
    if base.quantization is not None:
        require_base_left_alone(base.quantization["quant_method"], config)
    if scheme.changes_base:
        model_files(base.directory)  # refuses links, before the work that ends in a copy
    key, value = ("model.name_or_path", config.model.name_or_path)
    if config.model.attn_implementation is not None:
        key, value = ("model.attn_implementation", config.model.attn_implementation)
    instead = "write another, or mend its config.json"
    with blame(key, value, "the model cannot be built", instead, limit_seconds=META_SECONDS):
        meta_model = meta_copy(base.model_class, base.config)
        stored = base.stored(meta_model)
        shape = ModelShape.of(meta_model, base.dtype)
        blocks, text = find_blocks(meta_model), text_model(meta_model)
    in_files = stored if base.index else None
    if in_files:
        require_whole(meta_model, in_files)
    if world.is_main:  # who calls this brings the others to its error
        require_ties(meta_model, stored, base.dtype)
    entries = base.entries or {name: (base.dtype, tuple(it.shape)) for name, it in meta_model.named_parameters()}
    holding = Holding.of(config.deepspeed, world.size)
    selection, targets, chosen = _choose_targets(meta_model, config, in_files, in_pieces=holding.is_sharded)
    if base.index:
        require_targets(base.weights, targets)
    saved_parameters = {name: in_files.key_of(name) if in_files else name for name in selection.saved_parameters}
    require_saved(base.weights, saved_parameters)
    factor_dtypes = {
        target.name: factor_dtype(base.dtype, base.weights.get(target.weight_key), config.output.residual_dtype)
        for target in targets
    }
    data = step_data = None
    if reads_data and (scheme.source == "gradient" or config.calibration.names_data):
        data, step_data = _share_out(read_data(config, base, shape, world), config, "calibration.max_samples")
        if scheme.source == "gradient" and all(sample.images is None for sample in data.samples):
            require_gradients_of_text(config.lora, targets, text)
    saved, amount = saved_order(order, blocks), _amount(config, data, shape)
    require_alike(data, saved or chosen, "calibration.data_files", world.size)
    return CheckpointRequest(
        config=_resolved(config, base),
        plan=make_plan(targets, config, world.size, saved or chosen, amount),
        data=data,
        step_data=step_data,
        factor_dtypes=factor_dtypes,
        base=base,
        stored=stored,
        shape=shape,
        blocks=blocks,
        saved_order=saved,
        amount=amount,
        coverage=selection.coverage,
        left_out=selection.left_out,
        saved_parameters=saved_parameters,
        entries=entries,
    )


def _amount(config: InitConfig, data: SampleSharder | None, shape: ModelShape) -> Amount:
    """Of data that was read, or else may be; by a rank's microbatches, so that the number of ranks changes nothing."""
    calibration = config.calibration
    length = within_positions(shape.max_positions, calibration.max_length)
    num_samples, num_tokens = calibration.most_samples, calibration.most_samples * length
    if data is not None:
        lengths = [len(inputs["input_ids"]) for sample in data.samples for inputs in sample.sequences]
        num_samples, num_tokens = data.num_samples, sum(min(length, each) for each in lengths)
    num_microbatches = -(-num_samples // calibration.per_device_batch_size)
    return Amount(num_tokens=num_tokens, num_microbatches=num_microbatches, dtype=shape.dtype)


def _share_out(data: Sharder, config: MethodConfig, key: str) -> tuple[Sharder, Sharder | None]:
    """What gradients are taken of, and what the length of a step is searched on. Raises UserError."""
    if not config.init.searches_step:
        return data, None
    try:
        return kept_apart(data)
    except ValueError as problem:
        raise UserError(key, data.num_samples, f"the data {problem}; write init.step, or init.scheme rrr") from problem


def understand_model(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Microbatch] | None,
    config: MethodConfig,
    world: World,
    *,
    is_partitioned: bool,
    max_batches: int | None = None,
) -> Request:
    """Understand what `loraga_dist.initialize` is asked: targets and plan of a model in memory. A collective.

    batches: this rank's own, read once, `max_batches` of them at most; of schemes without gradient the first alone.
    Raises UserError, on all ranks, for a model or batches it cannot work with.
    """
    with world.together():
        if not hasattr(model, "config") or hasattr(model, "peft_config"):
            raise UserError("model", type(model).__name__, "must be a transformers model without an adapter")
        scheme = SCHEMES[config.init.scheme]
        require_task(model, config.lora.task_type)
        require_classes(config, model.config, type(model).__name__)
        selection, targets, order = _choose_targets(
            meta_copy(type(model), model.config), config, None, in_pieces=is_partitioned
        )
        require_unquantized(model, targets)
        if config.lora.use_dora and config.init.searches_step:
            problem = "has magnitudes that follow the step whose length is searched; write false, or init.step"
            raise UserError("lora.use_dora", True, problem)
        if scheme.source != "gradient":
            max_batches = 1
        elif batches is None:
            raise UserError("dataloader", None, f"{scheme.title} takes gradients; give it batches of calibration data")
        microbatches = microbatches_from_batches(() if batches is None else batches, config.lora.task_type, max_batches)
        if scheme.source == "gradient":
            require_labels(microbatches, config.lora.task_type)
    dtype, data, amount = next(model.parameters()).dtype, None, USUAL_AMOUNT
    step_data = None
    if batches is not None:
        counts = torch.tensor([len(microbatches), sum(it.images is not None for it in microbatches)])
        total, with_images = world.sum_(counts.to(world.device)).tolist()
        data = BatchSharder(in_step(microbatches, world), mixes_images=0 < with_images < total)
        with world.together():
            require_alike(data, order, "dataloader", world.size)
        with world.together():
            data, step_data = _share_out(data, config, "dataloader")
        if step_data is not None:
            require_supervised(data, step_data, world)
        num_tokens = torch.tensor(sum(each.inputs["input_ids"].numel() for each in microbatches), device=world.device)
        amount = Amount(
            num_tokens=int(world.sum_(num_tokens)), num_microbatches=data.num_samples * world.size, dtype=dtype
        )
    return Request(
        config=config,
        plan=make_plan(targets, config, world.size, order, amount),
        data=data,
        step_data=step_data,
        factor_dtypes=dict.fromkeys((target.name for target in targets), dtype),
        amount=amount,
        coverage=selection.coverage,
        left_out=selection.left_out,
    )


def _choose_targets(
    meta_model: nn.Module, config: MethodConfig, in_files: StoredModel | None, *, in_pieces: bool
) -> tuple[Selection, list[Target], Order]:
    """What PEFT selects, the targets with the ranks to plan for, and the order to go through the model in."""
    has_budget = config.init.rank_budget is not None
    num_triplets = SCHEMES[config.init.scheme].num_triplets
    blocks, stacks = find_blocks(meta_model), find_stacks(meta_model)  # PEFT puts its own layers into it
    selection = select_targets(meta_model, config.lora, num_triplets, any_rank=has_budget, in_files=in_files)
    if SCHEMES[config.init.scheme].whitens:
        require_inputs_of_a(config, selection.targets, stacks)
    targets = planned_targets(selection.targets, config.lora, config.init)
    names = [target.name for target in targets]
    order = choose_order(config.gradient.order, type(meta_model).__name__, blocks, names, in_pieces=in_pieces)
    return selection, targets, order


def _resolved(config: InitConfig, base: BaseModel) -> InitConfig:
    is_local = Path(config.model.name_or_path).is_dir()
    deepspeed = config.deepspeed
    if isinstance(deepspeed, dict):  # a training JSON may hold keys of services, and reports are shown around
        deepspeed = {key: value for key, value in deepspeed.items() if key == "zero_optimization"}
    elif deepspeed is not None:
        deepspeed = _absolute(deepspeed)
    model = {"name_or_path": str(base.directory.resolve())} if is_local else {"revision": base.directory.name}
    model |= {"class_name": base.class_name}
    init, gradient, calibration = config.init, config.gradient, config.calibration
    if "stable_gamma" in SCHEMES[init.scheme].init_keys:
        init = init.model_copy(update={"stable_gamma": init.gamma})
    data = {key: _absolute(getattr(calibration, key)) for key in path_keys(calibration)}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "init": init,
            "gradient": gradient.model_copy(update={"activations_dir": _absolute(gradient.activations_dir)}),
            "calibration": calibration.model_copy(update=data),
            "output": config.output.model_copy(update={"dir": str(Path(config.output.dir).expanduser().resolve())}),
            "deepspeed": deepspeed,
        }
    )


def _absolute(paths: Any) -> Any:
    """The same paths from any working directory; URLs as they are."""
    if isinstance(paths, list):
        return [_absolute(path) for path in paths]
    return paths if paths is None or "://" in paths else str(Path(paths).resolve())
