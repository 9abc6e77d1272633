"""The length of a first step: the one that lowers the loss most on data that the gradient has not seen."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from loraga_dist.artifacts.report import FoundStep
from loraga_dist.data.losses import Loss, cross_entropy_sum
from loraga_dist.data.microbatches import MicrobatchSharder
from loraga_dist.gradients.forward import forward
from loraga_dist.gradients.head import LOGITS_AT_ONCE
from loraga_dist.model.blocks import pieces_of
from loraga_dist.model.plan import Plan
from loraga_dist.model.targets import layers_of
from loraga_dist.ranks.progress import phase
from loraga_dist.request.request import USUAL_LENGTHS
from loraga_dist.sharding.base import Sharding

FIRST_LENGTH = 2.0**-8
SHORTEST, LONGEST = 2.0**-14, 2.0**-2


def search_step(peft_model: Any, plan: Plan, data: MicrobatchSharder, loss: Loss, *, sharding: Sharding) -> FoundStep:
    """Walk over powers of two from FIRST_LENGTH to a length whose neighbours are both worse. A collective.

    peft_model: in eval mode, with a B of length 1 in its adapter, which stays as it is. The length is 0 where none that
    was tried lowers the loss.

    Source: a line search by forwards alone (Nocedal, Wright 2006, chapter 3).
    """
    world, model = sharding.world, peft_model.base_model.model
    layers = [model.get_submodule(name) for name in layers_of(plan.targets)]
    microbatches = data.microbatches(0, data.num_samples, 0)
    scalings = [layer.scaling["default"] for layer in layers]
    found: dict[float, float] = {}

    @torch.no_grad()
    def mean_loss(length: float) -> float:
        if length not in found:
            for layer, scaling in zip(layers, scalings, strict=True):
                layer.scaling["default"] = scaling * length
            sums = torch.zeros(2, dtype=torch.float64, device=world.device)
            for microbatch in microbatches:
                # times 0, an overflow of float16 would be no number
                off = peft_model.disable_adapter() if length == 0 else nullcontext()
                with off, sharding.passing(pieces_of(model)):
                    logits = forward(model, microbatch, world.device)
                sums[0] += _sum_by_parts(logits, loss.predicted(microbatch.inputs["labels"]))
                sums[1] += microbatch.num_terms
                progress.advance()
            loss_sum, num_terms = world.sum_(sums).tolist()
            # what is not finite is worse than all else
            found[length] = loss_sum / num_terms if num_terms and loss_sum < torch.inf else torch.inf
        return found[length]

    with phase("search step", USUAL_LENGTHS * len(microbatches), "microbatches", shown=world.is_main) as progress:
        try:
            before, best = mean_loss(0.0), FIRST_LENGTH
            while True:
                neighbours = [length for length in (best / 2, best * 2) if SHORTEST <= length <= LONGEST]
                better = min(neighbours, key=mean_loss)
                if mean_loss(better) >= mean_loss(best):
                    break
                best = better
        finally:
            for layer, scaling in zip(layers, scalings, strict=True):
                layer.scaling["default"] = scaling
    length = best if mean_loss(best) < before else 0.0
    return FoundStep(
        length=length, mean_loss_before=before, mean_loss_after=found[length], num_sequences=data.num_samples
    )


def _sum_by_parts(logits: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """The cross-entropy, whose float32 copy of the logits is one of some rows at a time."""
    rows, classes = logits.flatten(0, -2), predicted.flatten()
    num_rows = max(1, LOGITS_AT_ONCE // rows.shape[-1])
    parts = zip(rows.split(num_rows), classes.split(num_rows), strict=True)
    return torch.stack([cross_entropy_sum(part, of_part).double() for part, of_part in parts]).sum()
