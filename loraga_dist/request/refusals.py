"""What does not fit together in a request: settings, model, and targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from loraga_dist.config import InitConfig, LoraSection, MethodConfig, TaskType
from loraga_dist.data.losses import LOSSES
from loraga_dist.data.microbatches import BatchSharder, Microbatch, MicrobatchSharder
from loraga_dist.errors import UserError
from loraga_dist.model.base import DTYPES
from loraga_dist.model.blocks import Order
from loraga_dist.model.names import pattern_of, to_leave_out
from loraga_dist.model.stacks import Stack
from loraga_dist.model.targets import Target
from loraga_dist.model.towers import tower_of
from loraga_dist.ranks.world import World
from loraga_dist.schemes import SCHEMES


def require_base_left_alone(quantization: str, config: InitConfig) -> None:
    """Raise UserError for a start that would change quantized weights, or copy what was made of them."""
    held = f"and those of the checkpoint are quantized ({quantization})"
    if SCHEMES[config.init.scheme].changes_base:
        others = ", ".join(name for name, scheme in SCHEMES.items() if not scheme.changes_base)
        problem = f"changes the base's weights, {held}; write rrr, or another that leaves them alone ({others})"
        raise UserError("init.scheme", config.init.scheme, problem)
    if config.lora.use_dora:
        raise UserError("lora.use_dora", True, f"starts from norms of the base's weights, {held}; write false")


def require_gradients_of_text(lora: LoraSection, targets: Iterable[Target], text: str) -> None:
    """Raise UserError for targets beside the language model `text`."""
    tower_by_name = {target.pattern_name: tower_of(target.name, text) for target in targets}
    if names := [name for name, tower in tower_by_name.items() if tower is not None]:
        towers = dict.fromkeys(tower for tower in tower_by_name.values() if tower is not None)
        problem = f"takes in matrices of {' and '.join(towers)}, which text gives no gradient"
        key, value, instead = to_leave_out(names, lora, rf"{pattern_of(towers)}(\..*)?")
        raise UserError(key, value, f"{problem}; {instead}")


def require_inputs_of_a(config: MethodConfig, targets: Sequence[Target], stacks: Mapping[str, Stack]) -> None:
    """Raise UserError for a regression on inputs where what PEFT calls A is not on the inputs' side."""
    for target in targets:
        if target.stack is not None and stacks[target.stack.parameter].swapped:
            parameter, others = target.stack.parameter, [name for name, it in SCHEMES.items() if not it.whitens]
            problem = f"regresses on inputs, and PEFT's A of {parameter} is on the side of its outputs"
            instead = f"write {', '.join(others)}, or leave it out of lora.target_parameters"
            raise UserError("init.scheme", config.init.scheme, f"{problem}; {instead}")


def require_alike(data: MicrobatchSharder | None, order: Order, key: str, world_size: int) -> None:
    """Raise UserError where some ranks would gather a tower for their images, and others not. key: of the data."""
    if world_size > 1 and order.blocks is None and data is not None and data.mixes_images:
        problem = "some samples have images and some have none, and ranks go through this model together"
        raise UserError(key, data.num_samples, f"{problem} ({order.why}); leave the ones or the others out")


def require_unquantized(model: nn.Module, targets: Sequence[Target]) -> None:
    """Raise UserError for targets that a model in memory does not hold in floating point."""
    parameters = dict(model.named_parameters())
    for target in targets:
        weight = parameters.get(target.parameter_name)
        if weight is None or weight.dtype not in DTYPES.values():
            held = "no weight" if weight is None else f"a weight in {str(weight.dtype).removeprefix('torch.')}"
            raise UserError("model", target.name, f"holds {held}; load the model in {', '.join(DTYPES)}")


def require_task(model: Any, task_type: TaskType) -> None:
    """Raise UserError for a model in memory that is not what the task is of: its labels would be shifted twice, or not
    at all."""
    config = model.config
    if config.is_encoder_decoder and task_type == "CAUSAL_LM":
        problem = "is of an encoder and a decoder; write SEQ_2_SEQ_LM"
    elif not config.is_encoder_decoder and task_type == "SEQ_2_SEQ_LM":
        problem = "is not of an encoder and a decoder; write CAUSAL_LM"
    elif task_type != "SEQ_CLS" and not hasattr(model, "prepare_inputs_for_generation"):
        problem = "generates nothing, as PEFT wants of models for it; write SEQ_CLS for a classifier"
    elif task_type == "SEQ_CLS" and model.get_output_embeddings() is not None:
        problem = "gives logits of tokens; load it by AutoModelForSequenceClassification, or write its own task"
    else:
        return
    raise UserError("lora.task_type", task_type, f"{type(model).__name__} {problem}")


def require_classes(config: MethodConfig, model_config: Any, model_name: str) -> None:
    """Raise UserError for a gradient of a classifier whose loss is not of one class among several."""
    if config.lora.task_type != "SEQ_CLS" or SCHEMES[config.init.scheme].source != "gradient":
        return
    kind = getattr(model_config, "problem_type", None) or "single_label_classification"
    num_labels = getattr(model_config, "num_labels", None)
    if num_labels == 1 or kind != "single_label_classification":
        problem = f"{model_name} has num_labels {num_labels} and problem_type {kind}"
        others = ", ".join(name for name, scheme in SCHEMES.items() if scheme.source != "gradient")
        instead = f"gradients are taken of one class among several; write {others}, and no data"
        raise UserError("init.scheme", config.init.scheme, f"{problem}: {instead}")


def require_labels(microbatches: Iterable[Microbatch], task_type: TaskType) -> None:
    """Raise UserError for batches of a training script whose labels are not those of the task's loss."""
    for microbatch in microbatches:
        labels = microbatch.inputs["labels"]
        found = f"batch {microbatch.index} has labels of shape {list(labels.shape)}"
        if labels.is_floating_point():
            dtype = str(labels.dtype).removeprefix("torch.")
            problem = "yields labels that are no integers, and gradients are taken of classes; yield their numbers"
            raise UserError("dataloader", dtype, problem)
        if LOSSES[task_type].by_token and labels.dim() != 2:
            problem = f"takes a label of every token, and {found}; yield these, or write SEQ_CLS for a classifier"
            raise UserError("lora.task_type", task_type, problem)
        if not LOSSES[task_type].by_token and labels.numel() != len(microbatch.inputs["input_ids"]):
            problem = f"takes one label of every sequence, and {found}; yield these, or write the model's own task"
            raise UserError("lora.task_type", task_type, problem)


def require_supervised(data: BatchSharder, step_data: BatchSharder, world: World) -> None:
    """Raise UserError, on all ranks, where the gradient's batches or those kept apart have no label; a collective."""
    counts = [sum(it.num_supervised_tokens for it in part.batches) for part in (data, step_data)]
    of_gradient, of_step = world.sum_(torch.tensor(counts, device=world.device)).tolist()
    total = data.num_samples + step_data.num_samples
    last = f"the last {step_data.num_samples} of {total} batches, on which the length of a step is searched"
    with world.together():
        if not of_gradient or not of_step:
            problem = f"{last}, have no label" if not of_step else f"no batch has a label but {last}"
            raise UserError("dataloader", total, f"{problem}; shuffle them")
