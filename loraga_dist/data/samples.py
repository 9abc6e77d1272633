"""Calibration data to tokenized samples: what TRL's SFTTrainer would train on, with its labels.

Every rank loads and tokenizes the same few hundred samples, so ranks agree on the data without talking to each other.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import torch

from loraga_dist.config import CalibrationConfig, TaskType
from loraga_dist.data.feedback import encoder
from loraga_dist.data.formats import BadRowError, data_error, data_source
from loraga_dist.data.image_rows import image_encoder, with_images
from loraga_dist.data.microbatches import Sample, count_supervised_tokens
from loraga_dist.errors import UserError, blame, reason

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

ROW_SECONDS = 30
"""For one row, which takes milliseconds; chat templates are programs, and may never end."""
LEAST_TRIED = 256
"""Samples, before data of which none has a token to learn from is given up."""
MOST_BRACKETS = 500
"""In one line of JSON, one inside the other: pyarrow reads them by recursion and dies at some ten thousand."""

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_samples(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task_type: TaskType,
    max_positions: int | None,
    load_processor: Callable[[], ProcessorMixin] | None = None,
) -> list[Sample]:
    """Load, shuffle and tokenize the first `most_samples` of the calibration data: the same list on every rank.

    Token ids and labels are those of TRL's `SFTTrainer._prepare_dataset` for CAUSAL_LM, of `DPOTrainer`'s for
    preference data; as there, samples that have nothing to learn from (after truncation, or with an advantage of 0) are
    left out, and the next ones take their place. Raises UserError, with the config key, for data that cannot be read,
    has the wrong columns or values, does not fit the model's positions, or has no token to learn from in many samples.
    load_processor: of the model, for images.
    """
    dataset = _load_dataset(config)
    with _quiet_datasets():
        images = with_images(config, dataset)
    if images is None:
        encode = encoder(config, tokenizer, dataset, task_type)
    else:
        assert load_processor is not None, "of data that may have images"
        dataset, encode = images, image_encoder(config, load_processor(), images, task_type)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed))
    samples, source, num_encoded = [], data_source(config), 0
    for row in order.tolist():
        if len(samples) == config.most_samples:
            break
        if not samples and num_encoded == max(config.most_samples, LEAST_TRIED):
            break
        with blame(*source, f"sample {row} makes no tokens", "mend or remove it", limit_seconds=ROW_SECONDS):
            try:
                encoded = encode(dataset[row])
            except BadRowError as problem:
                raise data_error(config, f"sample {row} {problem}") from problem
        if encoded is None:
            continue
        num_encoded += 1
        sequences = encoded.sequences
        num_tokens = max(len(values) for each in sequences for values in each.values() if isinstance(values, list))
        if max_positions is not None and num_tokens > max_positions:
            raise UserError(
                "calibration.max_length",
                config.max_length,
                f"sample {row} has {num_tokens} tokens but the model has {max_positions} positions; "
                f"write {max_positions} or less",
            )
        num_supervised = sum(count_supervised_tokens(torch.tensor(each["labels"]), task_type) for each in sequences)
        if all(each["input_ids"] for each in sequences) and num_supervised:
            samples.append(Sample(**vars(encoded), num_supervised_tokens=num_supervised, row=row))
    if not num_encoded:
        raise data_error(
            config,
            "has no advantage other than 0: no prompt has completions with different rewards; "
            "write several completions of each prompt, or a column advantage",
        )
    kinds = {sample.images.kind for sample in samples if sample.images is not None}
    if config.per_device_batch_size > 1 and len(kinds) > 1:
        problem = "images of this data come out of the processor in several shapes, which do not fit into a microbatch"
        raise UserError("calibration.per_device_batch_size", config.per_device_batch_size, f"{problem}; write 1")
    if not samples:
        raise data_error(
            config,
            f"none of the {num_encoded} samples that were read has a token to learn from; check that "
            f"calibration.max_length ({config.max_length}) does not cut the completions off, that texts are not empty, "
            "that chosen and rejected differ before they are cut, and, with calibration.assistant_only_loss, that "
            "assistant turns stand inside the chat template's generation markers",
        )
    return samples


def padding_token_id(tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None = None) -> int:
    """The id to pad with. The attention mask hides it, so without a padding token EOS will do, and without that 0.

    num_embeddings: of the model, where it is known. A token that was added to the tokenizer alone has none.
    """
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((found for found in ids if isinstance(found, int) and has_embedding(found, num_embeddings)), 0)


def has_embedding(token_id: int, num_embeddings: int | None) -> bool:
    """Whether a model takes this id, as far as it is known."""
    return token_id >= 0 and (num_embeddings is None or token_id < num_embeddings)


def fingerprints(samples: Iterable[Sample]) -> list[str]:
    """After each sample, the sha256 of all tokens, labels, weights and images so far: equal between ranks, and runs."""
    digest, found = hashlib.sha256(), []
    for sample in samples:
        content = [part for inputs in sample.sequences for part in (inputs["input_ids"], inputs["labels"])]
        if sample.weight is not None:
            content.append(sample.weight)
        if sample.images is not None:
            content.append(sample.images.digest)
        digest.update(json.dumps(content).encode())
        found.append(f"sha256:{digest.hexdigest()}")
    return found


def path_keys(config: CalibrationConfig) -> list[str]:
    """Which keys name paths of this machine, and no hub's id, nor files that lie in what `dataset_name` names."""
    name = config.dataset_name
    if name is None or name in _BUILDERS.values() and not _is_saved_dataset(Path(name)):
        return ["data_files"]
    return ["dataset_name"] if Path(name).is_dir() else []


def _load_dataset(config: CalibrationConfig) -> Dataset:
    import datasets

    if config.dataset_name and _is_saved_dataset(Path(config.dataset_name)):
        return _load_saved_dataset(config, config.dataset_name)
    source = config.dataset_name or _builder_name(config)
    with _quiet_datasets():
        try:
            builder = datasets.load_dataset_builder(source, config.dataset_config, data_files=config.data_files)
            if config.data_files and not any((builder.config.data_files or {}).values()):
                raise data_error(config, "matches no file; write paths or patterns of files that are there")
            if type(builder).__name__ == "Json" and not Path(builder.cache_dir).is_dir():
                _refuse_deep_lines(config, builder.config.data_files or {})
            builder.download_and_prepare()
        except StopIteration as error:  # how the JSON builder meets an empty file
            raise data_error(config, "has no rows") from error
        except UserError:
            raise
        except Exception as error:  # datasets lets through whatever pyarrow, pandas, the hub and its builders raise
            raise data_error(
                config,
                f"cannot be read: {reason(error.__cause__ or error)}; "
                "write the path or hub id of data that `datasets` loads",
            ) from error
        with blame("calibration.split", config.split, "is not in the data", "write one that is, or [:n] of one"):
            dataset = builder.as_dataset(split=config.split)
    assert isinstance(dataset, datasets.Dataset)
    if not len(dataset):
        raise data_error(config, f"has no rows in split {config.split}")
    return dataset


def _refuse_deep_lines(config: CalibrationConfig, files: Mapping[str, Iterable[str]]) -> None:
    """Raise UserError for lines of local JSON that pyarrow would die of."""
    for path in {str(path) for of_split in files.values() for path in of_split}:
        if not Path(path).is_file():
            continue
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.count(b"[") + line.count(b"{") > MOST_BRACKETS and _depth(line) > MOST_BRACKETS:
                    raise data_error(config, f"line {number} holds more than {MOST_BRACKETS} brackets in one another")


def _depth(line: bytes) -> int:
    """How deep brackets stand in one another, outside strings."""
    depth = deepest = 0
    for found in re.finditer(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', line):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(found[0], 0)
        deepest = max(deepest, depth)
    return deepest


def _is_saved_dataset(path: Path) -> bool:
    """Whether `save_to_disk` wrote this directory (other directories are for `load_dataset`)."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _load_saved_dataset(config: CalibrationConfig, path: str) -> Dataset:
    import datasets

    for key, value in (("data_files", config.data_files), ("dataset_config", config.dataset_config)):
        if value:
            problem = f"does not go with {path}, a directory that save_to_disk has written; write null"
            raise UserError(f"calibration.{key}", value, problem)
    with blame(*data_source(config), "cannot be read", "write a directory that datasets' save_to_disk has written"):
        saved = datasets.load_from_disk(path)
    splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    if config.split in splits:  # its name may itself be that of a slice
        dataset = splits[config.split]
    else:
        with blame("calibration.split", config.split, "is not in the data", "write one that is, or [:n] of one"):
            slices = datasets.ReadInstruction.from_spec(config.split)
            parts = slices.to_absolute({str(name): len(rows) for name, rows in splits.items()})
            dataset = datasets.concatenate_datasets(
                [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
            )
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
