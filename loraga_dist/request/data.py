"""The calibration data of a request, tokenized by the model's own tokenizer: the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from loraga_dist.config import InitConfig
from loraga_dist.data.microbatches import Sample, SampleSharder
from loraga_dist.data.samples import load_samples, padding_token_id
from loraga_dist.errors import UserError, blame
from loraga_dist.model.base import BaseModel
from loraga_dist.ranks.world import World


def read_data(config: InitConfig, base: BaseModel, world: World, began: datetime | None = None) -> SampleSharder:
    """Read, shuffle and tokenize the calibration data, and share it out. Raises UserError; no collective.

    began: what chat templates take for now.
    """
    tokenizer = _load_tokenizer(base.directory, config)
    samples = load_samples(
        config.calibration,
        tokenizer,
        task_type=config.lora.task_type,
        max_positions=base.max_positions,
        num_labels=getattr(base.config, "num_labels", None),
        began=began,
        load_processor=partial(_load_processor, base.directory, config),
    )
    _check_token_ids(config, base, samples)
    return SampleSharder(
        samples=samples,
        rank=world.rank,
        world_size=world.size,
        per_device_batch_size=config.calibration.per_device_batch_size,
        pad_token_id=_padding(config, base, tokenizer),
    )


def require_same_data(config: InitConfig, data_fingerprint: str | None, world: World) -> None:
    """Raise UserError on all ranks unless they all read the same data; a collective. None where none was read."""
    everyone = world.all_texts(data_fingerprint or "")
    others = [rank for rank, found in enumerate(everyone) if found != everyone[0]]
    with world.together():
        if others:
            calibration = config.calibration
            raise UserError(
                "calibration.data_files",
                calibration.data_files or calibration.dataset_name,
                f"ranks {others} read other data than rank 0; write a path under which all nodes see the same files",
            )


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
    largest = max(max(inputs["input_ids"]) for sample in samples for inputs in sample.sequences)
    if isinstance(rows, int) and largest >= rows:
        raise UserError(
            "model.name_or_path",
            config.model.name_or_path,
            f"its tokenizer makes token {largest}, the model has {rows} embeddings; write one whose tokenizer fits",
        )


def _load_tokenizer(directory: Path, config: InitConfig) -> Any:
    from transformers import AutoTokenizer

    instead = "write a model whose tokenizer transformers loads"
    with blame("model.name_or_path", config.model.name_or_path, "its tokenizer does not load", instead):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=config.model.trust_remote_code)


def _load_processor(directory: Path, config: InitConfig) -> Any:
    from transformers import AutoProcessor, ProcessorMixin

    instead = "write a model that reads images, or remove the data's column of images"
    with blame("model.name_or_path", config.model.name_or_path, "its processor of images does not load", instead):
        processor = AutoProcessor.from_pretrained(directory, trust_remote_code=config.model.trust_remote_code)
        if not isinstance(processor, ProcessorMixin):
            raise ValueError("it has a tokenizer alone")
    return processor
