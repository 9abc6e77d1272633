"""What calibration takes for granted of a model, tried on the data first: that a text's padding changes nothing of it,
and that the loss whose gradient is taken is the one the model's own forward gives."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from loraga_dist.data.losses import LOSSES
from loraga_dist.data.microbatches import SampleSharder
from loraga_dist.gradients.forward import forward, outputs
from loraga_dist.model.blocks import pieces_of
from loraga_dist.model.classes import names_in_forward
from loraga_dist.request.request import Request
from loraga_dist.sharding.base import Sharding

_TOLERANCE = 1e-3
"""Relative; of lower precisions some units in the last place."""

AnyRequest = TypeVar("AnyRequest", bound=Request)


@torch.no_grad()
def try_premises(model: nn.Module, request: AnyRequest, sharding: Sharding) -> tuple[AnyRequest, list[str]]:
    """Try them on the data of a request; a collective. The request, which takes texts one by one where a model sees
    their padding, and a line on every premise that does not hold."""
    cautions = []
    share = _share_of_padding(model, request, sharding)
    if share > _tolerance(model):
        assert isinstance(request.data, SampleSharder)
        size = request.data.per_device_batch_size
        cautions.append(
            f"padding changes what {type(model).__name__} makes of a text (its logits by {share:.2g} of the largest): "
            f"the gradient is that of texts one by one, not of {size} together; train with batches of one, or of texts "
            "of one length"
        )
        one_by_one = [data and replace(data, per_device_batch_size=1) for data in (request.data, request.step_data)]
        request = replace(request, data=one_by_one[0], step_data=one_by_one[1])
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
    return max(_TOLERANCE, 8 * torch.finfo(next(model.parameters()).dtype).eps)


def _share_of_padding(model: nn.Module, request: Request, sharding: Sharding) -> float:
    """By how much the logits of the shortest text change beside the longest, of the largest of them."""
    data = request.data
    # a causal model sees no padding on the right
    if not isinstance(data, SampleSharder) or data.per_device_batch_size == 1 or not _may_look_ahead(model, request):
        return 0.0
    by_length = sorted(data.samples, key=lambda sample: len(sample.sequences[0]["input_ids"]))
    alone, beside = (
        replace(data, samples=samples, rank=0, world_size=1, per_device_batch_size=len(samples))
        for samples in (by_length[:1], [by_length[0], by_length[-1]])
    )
    found = []
    for each in (alone, beside):
        (microbatch,) = each.microbatches(0, each.num_samples, 0)
        with sharding.passing(pieces_of(model)):
            found.append(forward(model, microbatch, sharding.world.device)[0].float())
    change = (found[1][: len(found[0])] - found[0]).abs().max() / found[0].abs().max()
    return sharding.world.max_(change).item()


def _may_look_ahead(model: nn.Module, request: Request) -> bool:
    return request.config.lora.task_type != "CAUSAL_LM" or not _has_shared_loss(model)


def _has_shared_loss(model: nn.Module) -> bool:
    """Whether it calls transformers' loss for its task, as all but the oldest models do."""
    return "loss_function" in names_in_forward(type(model))


def _losses(model: nn.Module, request: Request, sharding: Sharding) -> tuple[float, float] | None:
    """The model's own loss of all ranks' first microbatches, and the one whose gradient is taken; None where it calls
    transformers' own, or has none."""
    data, world = request.data, sharding.world
    if data is None or _has_shared_loss(model):
        return None
    microbatch = data.microbatches(0, data.samples_per_step, 0)[0]
    with sharding.passing(pieces_of(model)):
        output = outputs(model, microbatch, world.device, with_loss=True)
    if output.loss is None:
        return None
    loss = LOSSES[request.config.lora.task_type](output.logits, microbatch.inputs["labels"])
    count = microbatch.num_supervised_tokens
    own = output.loss * count if count else torch.zeros_like(loss)
    sums = torch.stack([own.double(), loss.double(), torch.tensor(count, device=world.device).double()])
    own_sum, loss_sum, total = world.sum_(sums).tolist()
    return own_sum / total, loss_sum / total
