"""How far a start is from the model it was made of, and how far another rounding of the weights alone would be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from loraga_dist.artifacts.report import IdentityCheck
from loraga_dist.config import TaskType
from loraga_dist.data.losses import IGNORED, LOSSES
from loraga_dist.data.microbatches import PROBE_TOKENS, Microbatch, count_supervised_tokens
from loraga_dist.errors import RunError
from loraga_dist.gradients.forward import forward
from loraga_dist.model.base import WIDE_FLOATS
from loraga_dist.model.blocks import pieces_of
from loraga_dist.model.shape import max_positions, within_positions
from loraga_dist.model.targets import Target
from loraga_dist.ranks.world import World
from loraga_dist.request.request import Request
from loraga_dist.schemes import Scheme
from loraga_dist.sharding.base import Sharding
from loraga_dist.sharding.slices import part_of

_FLOAT32_TOLERANCE = 1e-3
"""Of the largest logit; runs that are right stay below 1e-5."""

_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16}
"""Dtypes whose rounding shows, as integers of the same size."""

_FLIPPED = (13, 11)
"""Of so many entries one moves by a unit in the last place: in the mean square that is a rounding, 1/12 of a unit
squared. The second where the first divides the matrix, so that no column is moved alone."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What logits are compared on: this rank's first microbatch, or seeded token ids where there is no data."""

    microbatch: Microbatch
    predicted_P: torch.Tensor
    """The supervised token, or class, that each compared position predicts; all -100 where there is none."""
    positions_P: torch.Tensor
    """Positions of the first sequence."""

    @classmethod
    def of(cls, model: nn.Module, request: Request) -> Probe:
        task = request.config.lora.task_type
        if request.data is None:
            microbatch = _seeded_microbatch(model, task)
            labels_T = torch.full_like(microbatch.inputs["labels"][0], IGNORED)
        else:
            microbatch = request.data.microbatches(0, request.data.samples_per_step, 0)[0]
            labels_T = microbatch.inputs["labels"][0]
        predicted_T = LOSSES[task].predicted(labels_T).reshape(-1)
        supervised = (predicted_T != IGNORED).nonzero().flatten()
        positions_P = (supervised if len(supervised) else torch.arange(len(predicted_T)))[:PROBE_TOKENS]
        return cls(microbatch=microbatch, predicted_P=predicted_T[positions_P], positions_P=positions_P)

    @torch.no_grad()
    def logits(self, model: nn.Module, sharding: Sharding) -> torch.Tensor:
        """Logits (P, V) at the positions, float32 on the host; a collective under ZeRO-3."""
        with sharding.passing(pieces_of(model)):
            logits = forward(model, self.microbatch, sharding.world.device)
        first = logits[0].reshape(-1, logits.shape[-1])
        return first[self.positions_P.to(first.device)].float().cpu()

    def rerounded_logits(self, model: nn.Module, targets: Sequence[Target], sharding: Sharding) -> torch.Tensor | None:
        """The logits had the targets' weights been rounded another way; None in a dtype that hardly rounds.

        The weights are the same bits afterwards.
        """
        if coarsest_dtype(model, targets) not in _BITS:
            return None
        flip_last_bits(model, targets, sharding)
        try:
            return self.logits(model, sharding)
        finally:
            flip_last_bits(model, targets, sharding)


def _seeded_microbatch(model: nn.Module, task_type: TaskType) -> Microbatch:
    """One sequence of random token ids, the same on every rank."""
    length = within_positions(max_positions(model), PROBE_TOKENS)
    config: Any = model.config
    num_embeddings = getattr(config.get_text_config(), "vocab_size", 256)
    ids = torch.randint(num_embeddings, (1, length), generator=torch.Generator().manual_seed(0))
    eos = getattr(config, "eos_token_id", None)
    if isinstance(eos, int):  # where BART's classifier reads
        ids[:, -1] = eos
    labels = torch.zeros(1, dtype=torch.long) if task_type == "SEQ_CLS" else ids
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return Microbatch(inputs, count_supervised_tokens(labels, task_type), index=0, sample_ids=())


def coarsest_dtype(model: nn.Module, targets: Sequence[Target]) -> torch.dtype:
    """Of the first parameter and the targets' weights; scripts keep embeddings, or other layers, in float32."""
    first = next(parameter.dtype for parameter in model.parameters() if parameter.dtype in WIDE_FLOATS)
    weights = (model.get_parameter(target.parameter_name).dtype for target in targets)
    return max(first, *weights, key=lambda dtype: torch.finfo(dtype).eps)


@torch.no_grad()
def flip_last_bits(model: nn.Module, targets: Sequence[Target], sharding: Sharding) -> None:
    """Flip the last bit of some entries of the targets' weights, by as much as rounding them did; twice does nothing.

    Positions follow from the shape alone, so that any number of ranks flips the same.
    """
    for target in targets:
        step = next((step for step in _FLIPPED if target.M * target.N % step), _FLIPPED[0])

        def flip(shard: torch.Tensor, start: int, target: Target = target, step: int = step) -> None:
            part, first = part_of(shard, start, target)
            if part.dtype in _BITS:  # some are kept in float32 beside others
                part[-first % step :: step].view(_BITS[part.dtype]).bitwise_xor_(1)

        sharding.edit(model.get_parameter(target.parameter_name), flip)


def compare_logits(
    probe: Probe,
    before: torch.Tensor,
    rerounded: torch.Tensor | None,
    after: torch.Tensor,
    *,
    dtype: torch.dtype,
    scheme: Scheme,
    world: World,
) -> IdentityCheck:
    """Judge the start's logits (P, V) by the model's, over all ranks. Raises RunError for one that is off."""
    largest = torch.tensor([(after - before).abs().max(), before.abs().max()], device=world.device)
    # a maximum over ranks may lose a NaN
    diff, scale = world.max_(largest.nan_to_num_(nan=math.inf)).tolist()
    # lower precisions round W_res, by as much as the offset is large; float32 has no such excuse
    differs = scheme.starts_at_model and dtype == torch.float32 and diff > _FLOAT32_TOLERANCE * scale
    if differs or math.isinf(diff):
        with world.together():
            raise RunError(
                f"place: the start's logits differ from the model's by {diff:.3g} (largest logit {scale:.3g})"
            )
    supervised = probe.predicted_P != IGNORED
    sums = torch.stack(
        [
            divergence(before, after),
            divergence(before, before if rerounded is None else rerounded),
            torch.tensor(len(before)).double(),
            *(F.cross_entropy(logits, probe.predicted_P, reduction="sum").double() for logits in (before, after)),
            supervised.sum().double(),
        ]
    )
    kl, kl_of_rounding, num_positions, loss_before, loss_after, num_supervised = world.sum_(
        sums.to(world.device)
    ).tolist()
    return IdentityCheck(
        max_abs_logit_diff=diff,
        max_abs_logit=scale,
        dtype=str(dtype).removeprefix("torch."),
        kl=kl / num_positions,
        kl_of_rounding=None if rerounded is None else kl_of_rounding / num_positions,
        mean_loss_before=loss_before / num_supervised if num_supervised else None,
        mean_loss_after=loss_after / num_supervised if num_supervised else None,
    )


def divergence(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """The sum over rows of KL(softmax(before) || softmax(after)), float64, row by row: vocabularies are large."""
    pairs = zip(before, after, strict=True)
    return torch.stack([
        F.kl_div(q.double().log_softmax(-1), p.double().log_softmax(-1), reduction="sum", log_target=True)
        for p, q in pairs
    ]).sum()  # fmt: skip
