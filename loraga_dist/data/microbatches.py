"""Microbatches: what one rank puts through one forward and backward, and who gets which."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from loraga_dist.config import TaskType
from loraga_dist.data.feedback import Encoded
from loraga_dist.data.formats import Inputs
from loraga_dist.data.images import Load, together
from loraga_dist.data.losses import IGNORED, LOSSES
from loraga_dist.errors import UserError
from loraga_dist.ranks.world import World

_PADDING = {"labels": IGNORED, "attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0}

PROBE_TOKENS = 64
"""Positions of each rank's first calibration sequence whose logits are compared before and after."""


@dataclass(frozen=True)
class Sample(Encoded):
    """One tokenized row of the data."""

    num_supervised_tokens: int
    """Of a pair, of both."""
    row: int
    """Number of the row in the data set, before the shuffle."""


@dataclass(frozen=True)
class Microbatch:
    """What one rank puts through one forward and backward: int64 CPU tensors, padded on the right."""

    inputs: dict[str, Tensor]
    num_supervised_tokens: int
    index: int
    """Number of the global microbatch."""
    sample_ids: tuple[int, ...]
    """Rows of the data set, to name a bad batch; empty where they are not known."""
    weights: Tensor | None = None
    """Of each sequence's loss, float32; None: 1."""
    num_pairs: int | None = None
    """Of preference data; else None."""
    images: Load | None = None
    """What the model is given beside tokens; None for texts alone."""
    is_copy: bool = False
    """Of a microbatch that counts elsewhere, for a rank without one."""

    @property
    def num_terms(self) -> int:
        """What the loss, a sum, is divided by in the end; of all microbatches."""
        return self.num_supervised_tokens if self.num_pairs is None else self.num_pairs


def count_supervised_tokens(labels: Tensor, task_type: TaskType) -> int:
    """How many terms the loss sums over: for CAUSAL_LM no token predicts the first position, for SEQ_CLS one a sample.

    `labels`: (..., T) integers, for SEQ_CLS (...), -100 where there is no loss.
    """
    return int((LOSSES[task_type].predicted(labels) != IGNORED).sum())


def counted_rows(microbatch: Microbatch, share: float) -> dict[int, Tensor]:
    """Which rows of a layer's input count where a share of all tokens is enough: their numbers, by how many rows there
    are. No padding, and of a copy none; of layers whose rows are other than tokens it says nothing.

    A sequence's own tokens decide, so that it does not matter who gets it.
    """
    labels = microbatch.inputs["labels"]
    ids_BT = microbatch.inputs["input_ids"]
    mask = microbatch.inputs.get("attention_mask")
    if mask is None or mask.shape != ids_BT.shape:  # none, or one of blocks
        mask = torch.ones_like(ids_BT)
    by_length = {}
    # a decoder with an encoder has the labels' length; where both are alike, the encoder's padding is left out of both
    for tokens_BT, kept_BT in ((labels, labels != IGNORED), (ids_BT, mask != 0)):
        if tokens_BT.dim() != 2:
            continue
        counts_BT = kept_BT.clone()
        if microbatch.is_copy:
            counts_BT.zero_()
        elif share < 1:
            for tokens_T, counts_T in zip(tokens_BT, counts_BT, strict=True):
                own_T = tokens_T[counts_T]
                draw = torch.Generator().manual_seed(zlib.crc32(own_T.numpy().tobytes()))
                counts_T[counts_T.clone()] = torch.rand(len(own_T), generator=draw) < share
        by_length[counts_BT.numel()] = counts_BT.flatten().nonzero().flatten()
    return by_length


@dataclass(frozen=True, kw_only=True)
class SampleSharder:
    """Samples that every rank knows, split evenly: every rank gets as many microbatches, as each is a collective.

    Each global microbatch holds `world_size * per_device_batch_size` consecutive samples, split among the ranks in
    order. A rank that the last one leaves empty-handed gets a copy of sample 0 without any supervised token.
    """

    samples: list[Sample]
    rank: int
    world_size: int
    per_device_batch_size: int
    pad_token_id: int

    @property
    def samples_per_step(self) -> int:
        """In one global microbatch."""
        return self.world_size * self.per_device_batch_size

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    @property
    def loss(self) -> str:
        """Whose gradient is taken: `cross_entropy`, or at the start of `dpo` or of a `policy_gradient`."""
        first = self.samples[0]  # the columns decide, and all have the same
        if first.rejected is not None:
            return "dpo"
        return "cross_entropy" if first.weight is None else "policy_gradient"

    @property
    def mixes_images(self) -> bool:
        """Some samples have images, and some have none."""
        return 0 < sum(sample.images is not None for sample in self.samples) < len(self.samples)

    @property
    def num_tokens(self) -> int:
        return sum(len(inputs["input_ids"]) for sample in self.samples for inputs in sample.sequences)

    @property
    def num_supervised_tokens(self) -> int:
        return sum(sample.num_supervised_tokens for sample in self.samples)

    def microbatches(self, start: int, stop: int, first_index: int) -> list[Microbatch]:
        """This rank's of samples [start, stop); the first global microbatch gets this number."""
        samples, microbatches = self.samples[start:stop], []
        for index, first in enumerate(range(0, len(samples), self.samples_per_step), first_index):
            own = first + self.rank * self.per_device_batch_size
            mine = samples[own : own + self.per_device_batch_size]
            shown = mine or samples[:1]
            has_weights, has_pairs = shown[0].weight is not None, shown[0].rejected is not None
            microbatch = Microbatch(
                inputs=_collate([inputs for sample in shown for inputs in sample.sequences], self.pad_token_id),
                num_supervised_tokens=sum(sample.num_supervised_tokens for sample in mine),
                index=index,
                sample_ids=tuple(sample.row for sample in mine),
                weights=torch.tensor([weight for sample in shown for weight in sample.weights])
                if has_weights
                else None,
                num_pairs=len(mine) if has_pairs else None,
                images=together(sample.images for sample in shown),
            )
            microbatches.append(microbatch if mine else without_supervision(microbatch, index))
        return microbatches


@dataclass(frozen=True)
class BatchSharder:
    """Each rank's own batches, each counted as one sample."""

    batches: list[Microbatch]
    mixes_images: bool = False
    """Of all ranks' batches some have images, and some have none."""

    samples_per_step = 1

    @property
    def num_samples(self) -> int:
        return len(self.batches)

    @property
    def loss(self) -> str:
        """As of `SampleSharder`."""
        first = self.batches[0]
        if first.num_pairs is not None:
            return "dpo"
        return "cross_entropy" if first.weights is None else "policy_gradient"

    def microbatches(self, start: int, stop: int, first_index: int) -> list[Microbatch]:
        assert start == first_index, "batches of a dataloader are not dealt out anew"
        return self.batches[start:stop]


MicrobatchSharder = SampleSharder | BatchSharder
"""This rank's microbatches out of all ranks' data; the same number on every rank."""

Sharder = TypeVar("Sharder", SampleSharder, BatchSharder)


STEP_SAMPLES = 16
"""Kept apart from the gradient's, to search the length of a step."""


def num_kept_apart(num_samples: int) -> int:
    """A quarter at most, one at least."""
    return max(1, min(STEP_SAMPLES, num_samples // 4))


def kept_apart(data: Sharder) -> tuple[Sharder, Sharder]:
    """All but the last `num_kept_apart` samples, and these.

    Raises ValueError where there is one alone, or the data is not of a loss that can be searched.
    """
    if data.loss != "cross_entropy":
        raise ValueError("has weights, which say where the loss falls at the start and not how far")
    count = num_kept_apart(data.num_samples)
    if count == data.num_samples:
        raise ValueError("is one sample, and the length of a step is searched on another")
    if isinstance(data, BatchSharder):
        return replace(data, batches=data.batches[:-count]), replace(data, batches=data.batches[-count:])
    return replace(data, samples=data.samples[:-count]), replace(data, samples=data.samples[-count:])


def without_supervision(microbatch: Microbatch, index: int) -> Microbatch:
    """A copy with every label masked, for a rank that must take part in a step for which it has no data."""
    labels = torch.full_like(microbatch.inputs["labels"], IGNORED)
    return replace(
        microbatch,
        inputs=microbatch.inputs | {"labels": labels},
        num_supervised_tokens=0,
        index=index,
        sample_ids=(),
        num_pairs=None if microbatch.num_pairs is None else 0,
        is_copy=True,
    )


def microbatches_from_batches(
    batches: Iterable[Mapping[str, Any] | Microbatch], task_type: TaskType, limit: int | None = None
) -> list[Microbatch]:
    """The first `limit` batches of a training script's own dataloader as microbatches, on the CPU.

    Entries that are no tensors are left out; microbatches stay as they are. Raises UserError when a batch has no
    `input_ids` or `labels`.
    """
    microbatches = []
    for index, batch in enumerate(islice(batches, limit)):
        if isinstance(batch, Microbatch):
            microbatches.append(replace(batch, index=index))
            continue
        if not isinstance(batch, Mapping):
            raise UserError("dataloader", type(batch).__name__, "yields batches that are no dict of tensors")
        # copied, since a dataloader may fill the same buffers again
        inputs = {
            name: value.detach().to("cpu", copy=True) for name, value in batch.items() if isinstance(value, Tensor)
        }
        missing = [name for name in ("input_ids", "labels") if name not in inputs]
        if missing:
            raise UserError(
                "dataloader", sorted(batch), f"batch {index} has no tensor named {' or '.join(missing)}; yield both"
            )
        if not inputs["labels"].is_floating_point():  # no loss takes other integers
            inputs["labels"] = inputs["labels"].long()
        beside = {name: tensor for name, tensor in inputs.items() if not _is_of_tokens(name, tensor, inputs)}
        microbatches.append(
            Microbatch(
                inputs={name: tensor for name, tensor in inputs.items() if name not in beside},
                num_supervised_tokens=count_supervised_tokens(inputs["labels"], task_type),
                index=index,
                sample_ids=(),
                images=(lambda beside=beside: beside) if beside else None,
            )
        )
    return microbatches


def _is_of_tokens(name: str, tensor: Tensor, inputs: Mapping[str, Tensor]) -> bool:
    """Whether this input of a model is of its tokens, or sequences, and not of what images have beside them."""
    shapes = {inputs[of].shape[: tensor.dim()] for of in ("input_ids", "labels")}
    return "mask" in name and "pixel" not in name or tensor.shape in shapes


def _collate(sequences: list[Inputs], pad_token_id: int) -> dict[str, Tensor]:
    inputs = {}
    for name in sequences[0]:
        values = [torch.tensor(sequence[name]) for sequence in sequences]
        if values[0].dim() == 0:
            inputs[name] = torch.stack(values)
        else:
            inputs[name] = pad_sequence(values, batch_first=True, padding_value=_PADDING.get(name, pad_token_id))
    return inputs


def in_step(microbatches: Sequence[Microbatch], world: World) -> list[Microbatch]:
    """The same number of microbatches on every rank, because each forward under ZeRO-3 is a collective.

    Ranks with fewer get copies without supervised tokens. Raises UserError when a rank has none, or all have no token.
    """
    tokens = torch.tensor(sum(microbatch.num_supervised_tokens for microbatch in microbatches), device=world.device)
    with world.together():
        if not microbatches:
            raise UserError("dataloader", world.rank, "yields no batch on this rank; give every rank at least one")
    world.sum_(tokens)
    with world.together():
        if not tokens:
            raise UserError("dataloader", 0, "has no supervised token on any rank: every label is -100")
    most = int(world.max_(torch.tensor(len(microbatches), device=world.device)))
    fillers = [without_supervision(microbatches[0], index) for index in range(len(microbatches), most)]
    return [*microbatches, *fillers]
