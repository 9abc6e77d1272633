"""The calibration data of a request, tokenized by the model's own tokenizer: the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loraga_dist.config import InitConfig
from loraga_dist.data.formats import data_error
from loraga_dist.data.microbatches import Sample, SampleSharder
from loraga_dist.data.samples import has_embedding, load_samples, padding_token_id
from loraga_dist.errors import UserError, blame
from loraga_dist.model.base import BaseModel
from loraga_dist.model.classes import names_in_forward
from loraga_dist.model.shape import ModelShape
from loraga_dist.ranks.world import World
from loraga_dist.request.refusals import require_classes


def read_data(config: InitConfig, base: BaseModel, shape: ModelShape, world: World) -> SampleSharder:
    """Read, shuffle and tokenize the calibration data, and share it out. Raises UserError; no collective."""
    require_classes(config, base.config, base.model_class.__name__)
    tokenizer = _load_tokenizer(base.directory, config)
    samples = load_samples(
        config.calibration,
        tokenizer,
        task_type=config.lora.task_type,
        max_positions=shape.max_positions,
        load_processor=partial(_load_processor, base.directory, config),
    )
    _check_token_ids(config, base, samples)
    if config.lora.task_type == "SEQ_CLS":
        _check_classes(config, base, samples)
        if "eos_token_id" in names_in_forward(base.model_class):
            _require_ends(config, base, samples)
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
    num_embeddings, batch_size = _num_embeddings(base), config.calibration.per_device_batch_size
    any_will_do = padding_token_id(tokenizer, num_embeddings)
    if config.lora.task_type != "SEQ_CLS":
        return any_will_do
    own = getattr(base.config.get_text_config(), "pad_token_id", None)
    if own is not None and has_embedding(own, num_embeddings):
        return own
    if batch_size > 1:
        problem = "no pad_token_id" if own is None else f"pad_token_id {own}, which has no embedding"
        instead = "a classifier needs one for batches; write 1, or set it there"
        raise UserError("calibration.per_device_batch_size", batch_size, f"the model's config has {problem}: {instead}")
    return any_will_do


def _num_embeddings(base: BaseModel) -> int | None:
    rows = getattr(base.config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def _check_token_ids(config: InitConfig, base: BaseModel, samples: Sequence[Sample]) -> None:
    rows = _num_embeddings(base)
    largest = max(max(inputs["input_ids"]) for sample in samples for inputs in sample.sequences)
    if not has_embedding(largest, rows):
        raise UserError(
            "model.name_or_path",
            config.model.name_or_path,
            f"its tokenizer makes token {largest}, the model has {rows} embeddings; write one whose tokenizer fits",
        )


def _check_classes(config: InitConfig, base: BaseModel, samples: Sequence[Sample]) -> None:
    largest, count = max(sample.inputs["labels"] for sample in samples), getattr(base.config, "num_labels", None)
    if count is not None and largest >= count:
        problem = f"holds class {largest}; classes go from 0 to {count - 1}, the model's last"
        raise UserError("calibration.label_field", config.calibration.label_field, problem)


def _require_ends(config: InitConfig, base: BaseModel, samples: Sequence[Sample]) -> None:
    """Raise UserError for texts that a classifier which reads at the end of sequence cannot read together."""
    eos = base.config.eos_token_id
    counts = {sample.row: sample.sequences[0]["input_ids"].count(eos) for sample in samples}
    reads = f"{base.model_class.__name__} reads at token {eos}, the end of sequence,"
    if without := [row for row, count in counts.items() if not count]:
        problem = f"{reads} and sample {without[0]} has none; end texts with it, or take a tokenizer that does"
        raise data_error(config.calibration, problem)
    if len(set(counts.values())) > 1 and config.calibration.per_device_batch_size > 1:
        problem = f"{reads} of which texts that go together must have equally many; write 1"
        raise UserError("calibration.per_device_batch_size", config.calibration.per_device_batch_size, problem)


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
