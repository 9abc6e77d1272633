"""Calibration data to token batches: what TRL's SFTTrainer would train on, with its labels, dealt out to the ranks.

Every rank loads and tokenizes the same few hundred samples, so ranks agree on the data without talking to each other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from loraga_dist.config import CalibrationConfig, TaskType
from loraga_dist.data.formats import BadRowError, Inputs, data_error, encoder
from loraga_dist.data.losses import IGNORED
from loraga_dist.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_PADDING = {"labels": IGNORED, "attention_mask": 0, "token_type_ids": 0}


@dataclass(frozen=True)
class Sample:
    """One tokenized row: model inputs without padding, `labels` with -100 where there is no loss."""

    inputs: Inputs
    num_supervised_tokens: int
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


def load_samples(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task_type: TaskType,
    max_positions: int | None,
    num_labels: int | None = None,
) -> list[Sample]:
    """Load, shuffle and tokenize the first `most_samples` of the calibration data: the same list on every rank.

    Token ids and labels are those of TRL's `SFTTrainer._prepare_dataset` for CAUSAL_LM; as there, samples that have
    nothing to learn from (after truncation) are left out, and the next ones take their place. Raises UserError, with
    the config key, for data that cannot be read, has the wrong columns or values, does not fit the model's positions,
    or has no supervised token at all.
    """
    dataset = _load_dataset(config)
    encode = encoder(config, tokenizer, dataset, task_type, num_labels)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed))
    samples = []
    for position, row in enumerate(order.tolist()):
        # a data set in which so many samples in a row have no supervised token is taken to have none at all
        if len(samples) == config.most_samples or (not samples and position == config.most_samples):
            break
        try:
            inputs = encode(dataset[row])
        except BadRowError as problem:
            raise data_error(config, f"sample {row} {problem}") from problem
        num_tokens = max(len(values) for values in inputs.values() if isinstance(values, list))
        if max_positions is not None and num_tokens > max_positions:
            raise UserError(
                "calibration.max_length",
                config.max_length,
                f"sample {row} has {num_tokens} tokens but the model has {max_positions} positions; "
                f"write {max_positions} or less",
            )
        num_supervised_tokens = count_supervised_tokens(torch.tensor(inputs["labels"]), task_type)
        if inputs["input_ids"] and num_supervised_tokens:
            samples.append(Sample(inputs, num_supervised_tokens, row))
    if not samples:
        raise data_error(
            config,
            "has no supervised token: every label is masked; check that calibration.max_length "
            f"({config.max_length}) does not cut the completions off, that texts are not empty, and, with "
            "calibration.assistant_only_loss, that assistant turns stand inside the chat template's generation markers",
        )
    return samples


def count_supervised_tokens(labels: Tensor, task_type: TaskType) -> int:
    """How many terms the loss sums over: for CAUSAL_LM no token predicts the first position, for SEQ_CLS one a sample.

    `labels`: (..., T) integers, for SEQ_CLS (...), -100 where there is no loss.
    """
    if task_type == "CAUSAL_LM":
        labels = labels[..., 1:]
    return int((labels != IGNORED).sum())


def padding_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with. The attention mask hides it, so without a padding token EOS will do, and without that 0."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    return 0


class Deal(Protocol):
    """This rank's microbatches out of all ranks' data; the same number on every rank."""

    @property
    def samples_per_step(self) -> int:
        """In one global microbatch."""
        ...

    @property
    def num_samples(self) -> int: ...

    def microbatches(self, start: int, stop: int, first_index: int) -> list[Microbatch]:
        """Of samples [start, stop); the first global microbatch gets this number."""
        ...


@dataclass(frozen=True, kw_only=True)
class SampleDeal:
    """Samples that every rank knows, split evenly."""

    samples: list[Sample]
    rank: int
    world_size: int
    per_device_batch_size: int
    pad_token_id: int

    @property
    def samples_per_step(self) -> int:
        return self.world_size * self.per_device_batch_size

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    def microbatches(self, start: int, stop: int, first_index: int) -> list[Microbatch]:
        return assign_microbatches(
            self.samples[start:stop],
            rank=self.rank,
            world_size=self.world_size,
            per_device_batch_size=self.per_device_batch_size,
            pad_token_id=self.pad_token_id,
            first_index=first_index,
        )


@dataclass(frozen=True)
class BatchDeal:
    """Each rank's own batches, which are one sample each to this end."""

    batches: list[Microbatch]

    samples_per_step = 1

    @property
    def num_samples(self) -> int:
        return len(self.batches)

    def microbatches(self, start: int, stop: int, first_index: int) -> list[Microbatch]:
        assert start == first_index, "batches of a dataloader are not dealt out anew"
        return self.batches[start:stop]


def assign_microbatches(
    samples: list[Sample],
    *,
    rank: int,
    world_size: int,
    per_device_batch_size: int,
    pad_token_id: int,
    first_index: int = 0,
) -> list[Microbatch]:
    """This rank's microbatches; every rank gets the same number, because each forward is a collective.

    Each global microbatch, the first numbered `first_index`, holds `world_size * per_device_batch_size` consecutive
    samples, split among the ranks in order.
    A rank that the last one leaves empty-handed gets a copy of sample 0 without any supervised token.
    """
    assert samples and 0 <= rank < world_size
    global_size = world_size * per_device_batch_size
    microbatches = []
    for step in range(math.ceil(len(samples) / global_size)):
        index = first_index + step
        start = step * global_size + rank * per_device_batch_size
        mine = samples[start : start + per_device_batch_size]
        if not mine:
            filler = Microbatch(_collate(samples[:1], pad_token_id), 0, index, ())
            microbatches.append(without_supervision(filler, index))
            continue
        microbatches.append(
            Microbatch(
                inputs=_collate(mine, pad_token_id),
                num_supervised_tokens=sum(sample.num_supervised_tokens for sample in mine),
                index=index,
                sample_ids=tuple(sample.row for sample in mine),
            )
        )
    return microbatches


def without_supervision(microbatch: Microbatch, index: int) -> Microbatch:
    """A copy with every label masked, for a rank that must take part in a step for which it has no data."""
    labels = torch.full_like(microbatch.inputs["labels"], IGNORED)
    return Microbatch(microbatch.inputs | {"labels": labels}, 0, index, ())


def microbatches_from_batches(
    batches: Iterable[Mapping[str, Any]], task_type: TaskType, limit: int | None = None
) -> list[Microbatch]:
    """The first `limit` batches of a training script's own dataloader as microbatches, on the CPU.

    Entries that are no tensors are left out. Raises UserError when a batch has no `input_ids` or `labels`.
    """
    microbatches = []
    for index, batch in enumerate(islice(batches, limit)):
        if not isinstance(batch, Mapping):
            raise UserError("dataloader", type(batch).__name__, "yields batches that are no dict of tensors")
        inputs = {name: value.detach().cpu() for name, value in batch.items() if isinstance(value, Tensor)}
        missing = [name for name in ("input_ids", "labels") if name not in inputs]
        if missing:
            raise UserError(
                "dataloader", sorted(batch), f"batch {index} has no tensor named {' or '.join(missing)}; yield both"
            )
        microbatches.append(
            Microbatch(
                inputs=inputs,
                num_supervised_tokens=count_supervised_tokens(inputs["labels"], task_type),
                index=index,
                sample_ids=(),
            )
        )
    return microbatches


def seeded_microbatch(model_config: Any, task_type: TaskType, most_tokens: int) -> Microbatch:
    """One sequence of random token ids, the same on every rank, where only two forward passes are to be compared."""
    text = model_config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    length = min(most_tokens, positions) if isinstance(positions, int) and positions > 0 else most_tokens
    ids = torch.randint(text.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    eos = getattr(model_config, "eos_token_id", None)
    if isinstance(eos, int):  # where BART's classifier reads
        ids[:, -1] = eos
    labels = torch.zeros(1, dtype=torch.long) if task_type == "SEQ_CLS" else ids
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return Microbatch(inputs, count_supervised_tokens(labels, task_type), index=0, sample_ids=())


def fingerprints(samples: Iterable[Sample]) -> list[str]:
    """After each sample, the sha256 of all token ids and labels so far: equal between ranks, and between runs."""
    digest, found = hashlib.sha256(), []
    for sample in samples:
        digest.update(json.dumps([sample.inputs["input_ids"], sample.inputs["labels"]]).encode())
        found.append(f"sha256:{digest.hexdigest()}")
    return found


def _collate(samples: list[Sample], pad_token_id: int) -> dict[str, Tensor]:
    inputs = {}
    for name in samples[0].inputs:
        values = [torch.tensor(sample.inputs[name]) for sample in samples]
        if values[0].dim() == 0:
            inputs[name] = torch.stack(values)
        else:
            inputs[name] = pad_sequence(values, batch_first=True, padding_value=_PADDING.get(name, pad_token_id))
    return inputs


def _load_dataset(config: CalibrationConfig) -> Dataset:
    import datasets

    if config.dataset_name and _is_saved_dataset(Path(config.dataset_name)):
        return _load_saved_dataset(config, config.dataset_name)
    source = config.dataset_name or _builder_name(config)
    with _quiet_datasets():
        try:
            builder = datasets.load_dataset_builder(source, config.dataset_config, data_files=config.data_files)
            builder.download_and_prepare()
        except StopIteration as error:  # how the JSON builder meets an empty file
            raise data_error(config, "has no rows") from error
        except Exception as error:  # datasets lets through whatever pyarrow, pandas, the hub and its builders raise
            cause = error.__cause__ or error
            reason = str(cause).rstrip(".") or type(cause).__name__
            raise data_error(
                config, f"cannot be read: {reason}; write the path or hub id of data that `datasets` loads"
            ) from error
        try:
            dataset = builder.as_dataset(split=config.split)
        except ValueError as error:
            raise UserError("calibration.split", config.split, f"is not in the data: {error}") from error
    assert isinstance(dataset, datasets.Dataset)
    if not len(dataset):
        raise data_error(config, f"has no rows in split {config.split}")
    return dataset


def _is_saved_dataset(path: Path) -> bool:
    """Whether `save_to_disk` wrote this directory (other directories are for `load_dataset`)."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _load_saved_dataset(config: CalibrationConfig, path: str) -> Dataset:
    import datasets

    try:
        saved = datasets.load_from_disk(path)
    except (OSError, ValueError) as error:
        raise data_error(config, f"cannot be read: {error}") from error
    splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    if config.split not in splits:
        raise UserError(
            "calibration.split", config.split, f"is not in the data; write one of {', '.join(map(str, splits))}"
        )
    dataset = splits[config.split]
    if not len(dataset):
        raise data_error(config, f"has no rows in split {config.split}")
    return dataset


def _builder_name(config: CalibrationConfig) -> str:
    if not config.data_files:
        raise UserError(
            "calibration.dataset_name",
            config.dataset_name,
            "no data is named; write a hub id or a directory here, or files in calibration.data_files",
        )
    first = config.data_files if isinstance(config.data_files, str) else config.data_files[0]
    # from the right, so that names such as data.jsonl.gz are understood
    for suffix in reversed(PurePath(first).suffixes):
        if suffix in _BUILDERS:
            return _BUILDERS[suffix]
    raise UserError(
        "calibration.data_files",
        config.data_files,
        f"has none of the suffixes {', '.join(_BUILDERS)}; write its format (json, csv, parquet, text) in "
        "calibration.dataset_name",
    )


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bars and log lines from `datasets`: what goes wrong is raised as well."""
    import datasets
    from datasets.utils import logging

    had_bars, verbosity = not datasets.are_progress_bars_disabled(), logging.get_verbosity()
    datasets.disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()
