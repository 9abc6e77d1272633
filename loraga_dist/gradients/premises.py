"""What calibration takes for granted of a model, tried on the data first: that a text's padding changes nothing of it,
that no token of a causal model sees the next ones, and that the loss whose gradient is taken is the one the model's own
forward gives."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from loraga_dist.data.losses import IGNORED, LOSSES
from loraga_dist.data.microbatches import Sample, SampleSharder
from loraga_dist.gradients.forward import forward, outputs
from loraga_dist.model.base import WIDE_FLOATS
from loraga_dist.model.blocks import pieces_of
from loraga_dist.model.classes import names_in_forward
from loraga_dist.request.request import Request
from loraga_dist.sharding.base import Sharding

_TOLERANCE = 1e-3
"""Relative; of lower precisions some units in the last place."""

_ATTEND_TO_PADDING = {"blt", "deepseek_v4", "doge", "dots3_note_text", "mistral_large4", "paligemma"}
"""Causal models, by the model type of their config; at which lengths of texts differs. benchmarks/coverage.py finds
them."""

AnyRequest = TypeVar("AnyRequest", bound=Request)


@torch.no_grad()
def try_premises(model: nn.Module, request: AnyRequest, sharding: Sharding) -> tuple[AnyRequest, list[str]]:
    """Try them on the data of a request; a collective. The request, which takes texts one by one where a model sees
    their padding, and a line on every premise that does not hold."""
    cautions = []
    data = request.data
    if isinstance(data, SampleSharder) and (how := _sees_padding(model, request, data, sharding)):
        cautions.append(
            f"{how}: the gradient is that of texts one by one, not of {data.per_device_batch_size} together; train "
            "with batches of one, or of texts of one length"
        )
        one_by_one = [data and replace(data, per_device_batch_size=1) for data in (request.data, request.step_data)]
        request = replace(request, data=one_by_one[0], step_data=one_by_one[1])
    if (share := _share_of_what_follows(model, request, sharding)) > _tolerance(model):
        cautions.append(
            f"{type(model).__name__} lets tokens see those that follow (its logits change by {share:.2g} of the "
            "largest): the gradient is of a loss that reads its answers; take a config with is_decoder, or data that "
            "the model's processor marks by token_type_ids"
        )
    losses = _losses(model, request, sharding)
    if losses is not None and abs(losses[0] - losses[1]) > _tolerance(model) * max(1.0, abs(losses[1])):
        what = "of every next token" if LOSSES[request.config.lora.task_type].shifts else "with the labels"
        cautions.append(
            f"{type(model).__name__} gives another loss than the cross-entropy {what}, of which the gradient is: "
            f"{losses[0]:.4g} where that is {losses[1]:.4g}; train with the latter (compute_loss_func of transformers' "
            "trainers)"
        )
    return request, cautions


def _tolerance(model: nn.Module) -> float:
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.dtype in WIDE_FLOATS)
    return max(_TOLERANCE, 8 * torch.finfo(dtype).eps)


def _sees_padding(model: nn.Module, request: Request, data: SampleSharder, sharding: Sharding) -> str | None:
    """Say how, if it does."""
    name = type(model).__name__
    if data.per_device_batch_size == 1:
        return None
    if _may_attend_to_padding(model):
        return f"{name} may attend to padding among what it compresses, or chooses from"
    # other causal models see none on the right
    if request.config.lora.task_type == "CAUSAL_LM" and _has_shared_loss(model):
        return None
    share = _share_of_padding(model, data, sharding)
    if share <= _tolerance(model):
        return None
    return f"padding changes what {name} makes of a text (its logits by {share:.2g} of the largest)"


def _share_of_padding(model: nn.Module, data: SampleSharder, sharding: Sharding) -> float:
    """By how much the logits of the shortest text change beside the longest, of the largest of them; with a decoder's
    text beside the longest of these, too."""
    shortest = min(data.samples, key=lambda sample: sum(_lengths(sample)))
    longest = [max(data.samples, key=lambda sample: _lengths(sample)[part]) for part in range(len(_lengths(shortest)))]
    alone, beside = (
        replace(data, samples=samples, rank=0, world_size=1, per_device_batch_size=len(samples))
        for samples in ([shortest], [shortest, *longest])
    )
    found = []
    for each in (alone, beside):
        (microbatch,) = each.microbatches(0, each.num_samples, 0)
        with sharding.passing(pieces_of(model)):
            found.append(forward(model, microbatch, sharding.world.device)[0].float())
    return _largest_change(found[0], found[1][: len(found[0])], sharding)


def _share_of_what_follows(model: nn.Module, request: Request, sharding: Sharding) -> float:
    """By how much logits before it change with the last token of a text, of the largest of them.

    Only of models that know types of tokens, which encoders do, and those that read a prefix as one.
    """
    data = request.data
    knows_types = "token_type_ids" in inspect.signature(type(model).forward).parameters
    if data is None or request.config.lora.task_type != "CAUSAL_LM" or not knows_types:
        return 0.0
    microbatch = data.microbatches(0, data.samples_per_step, 0)[0]
    ids_BT = microbatch.inputs["input_ids"]
    supervised_P = (microbatch.inputs["labels"][0] != IGNORED).nonzero().flatten()
    last = int(supervised_P[-1]) if len(supervised_P) else 0
    other_BT = ids_BT.clone()
    # by a token of the text: others may stand for images
    other_BT[0, last] = next(
        (ids_BT[0, at] for at in supervised_P if ids_BT[0, at] != ids_BT[0, last]), ids_BT[0, last]
    )
    found = []
    for ids in (ids_BT, other_BT):
        with sharding.passing(pieces_of(model)):
            of_ids = replace(microbatch, inputs=microbatch.inputs | {"input_ids": ids})
            found.append(forward(model, of_ids, sharding.world.device)[0, :last].float())
    return _largest_change(found[0], found[1], sharding)


def _largest_change(before: torch.Tensor, after: torch.Tensor, sharding: Sharding) -> float:
    """On any rank, of logits (T, V) or (V,), relative to their largest; 0 where there are none. A collective."""
    change = before.new_zeros(())
    if before.numel():
        change = (after - before).abs().max() / before.abs().max()
    return sharding.world.max_(change).item()


def _lengths(sample: Sample) -> list[int]:
    """Of what a model is given of a sample, and of its labels, where they are tokens."""
    inputs = sample.sequences[0]
    return [len(tokens) for tokens in (inputs["input_ids"], inputs["labels"]) if isinstance(tokens, list)]


def _may_attend_to_padding(model: nn.Module) -> bool:
    config: Any = model.config
    return not _ATTEND_TO_PADDING.isdisjoint({config.model_type, config.get_text_config().model_type})


def _has_shared_loss(model: nn.Module) -> bool:
    """Whether it calls transformers' loss for its task, as all but the oldest models do."""
    return "loss_function" in names_in_forward(type(model))


def _losses(model: nn.Module, request: Request, sharding: Sharding) -> tuple[float, float] | None:
    """The model's own loss of all ranks' first microbatches, and the one whose gradient is taken; None where the model
    has none of its own, or calls transformers'."""
    data, world = request.data, sharding.world
    takes_labels = "labels" in inspect.signature(type(model).forward).parameters
    if data is None or not takes_labels or _has_shared_loss(model):
        return None
    microbatch = data.microbatches(0, data.samples_per_step, 0)[0]
    with sharding.passing(pieces_of(model)):
        output = outputs(model, microbatch, world.device, with_loss=True)
    loss = LOSSES[request.config.lora.task_type](output.logits, microbatch.inputs["labels"])
    count = microbatch.num_supervised_tokens
    own = output.loss * count if count else torch.zeros_like(loss)
    sums = torch.stack([own.double(), loss.double(), torch.tensor(count, device=world.device).double()])
    own_sum, loss_sum, total = world.sum_(sums).tolist()
    return (own_sum / total, loss_sum / total) if total else None
