"""Images beside texts: what TRL's SFTTrainer gives a model that reads both, made by the model's own processor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from loraga_dist.config import CalibrationConfig, TaskType
from loraga_dist.data.feedback import Encoded
from loraga_dist.data.formats import BadRowError, Row, data_error, messages_in, string_in, training_chat_template
from loraga_dist.data.images import ImageInputs
from loraga_dist.errors import UserError, reason

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import ProcessorMixin

_COLUMNS = ("images", "image")
"""As TRL calls them."""

Collate = Callable[[list[Row]], Mapping[str, Tensor]]


def with_images(config: CalibrationConfig, dataset: Dataset) -> Dataset | None:
    """The data with its images, or the paths it has of them, as their files have them; None for data without.

    Raises UserError for a column that holds something else.
    """
    import datasets

    column = next((column for column in _COLUMNS if column in dataset.column_names), None)
    if column is None:
        return None
    feature: Any = dataset.features[column]
    image = datasets.Image(decode=False)  # decoded, all of them would fill the memory
    try:
        return dataset.cast_column(column, datasets.List(image) if hasattr(feature, "feature") else image)
    except Exception as error:  # pyarrow's, or that of datasets
        problem = f"column {column} holds no images ({reason(error)}); write paths of image files"
        raise data_error(config, problem) from error


def image_encoder(
    config: CalibrationConfig, processor: ProcessorMixin, dataset: Dataset, task_type: TaskType
) -> Callable[[Row], Encoded]:
    """How rows with images become samples: those of TRL's DataCollatorForVisionLanguageModeling, one at a time.

    Refuses data that cannot serve before the work starts.
    """
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    columns = set(dataset.column_names)
    if task_type != "CAUSAL_LM":
        raise UserError("lora.task_type", task_type, "takes no images; write CAUSAL_LM, or remove the column of images")
    if worth := sorted(columns & {"chosen", "rejected", "advantage", "reward"}):
        problem = f"has images and {', '.join(worth)}: of images there is supervised calibration alone"
        raise data_error(config, f"{problem}; remove the ones or the others")
    pairs = {"prompt", "completion"} <= columns
    if not pairs and config.completion_only_loss:
        raise UserError("calibration.completion_only_loss", True, "needs columns prompt and completion; write null")
    if not pairs and not columns & {"messages", config.dataset_text_field}:
        problem = f"has images and no column messages, prompt and completion, or {config.dataset_text_field}"
        raise data_error(config, f"{problem}; it has {', '.join(sorted(columns))}")
    chat_template = training_chat_template(config, processor) if "messages" in columns else None  # type: ignore[arg-type]
    collator = DataCollatorForVisionLanguageModeling(
        processor,
        completion_only_loss=pairs and config.completion_only_loss is not False,
        dataset_text_field=config.dataset_text_field,
        assistant_only_loss=config.assistant_only_loss,
        chat_template=chat_template,
    )
    return partial(_encode, collate=collator, config=config, image_token=getattr(processor, "image_token_id", None))


def _encode(row: Row, *, collate: Collate, config: CalibrationConfig, image_token: int | None) -> Encoded:
    batch = _collated(row, collate, config)
    shape = batch["input_ids"].shape
    inputs = {name: tensor[0].tolist() for name, tensor in batch.items() if tensor.shape == shape}
    cut = inputs["input_ids"][config.max_length :]
    if image_token is not None and image_token in cut:
        problem = "cuts into the tokens of its images"
        raise BadRowError(f"has {shape[1]} tokens, and calibration.max_length {config.max_length} {problem}; raise it")
    inputs = {name: values[: config.max_length] for name, values in inputs.items()}
    beside = {name: tensor for name, tensor in batch.items() if name not in inputs}
    if not beside:
        return Encoded(inputs)
    digest = hashlib.sha256()
    for tensor in beside.values():
        digest.update(tensor.contiguous().numpy().tobytes())
    shapes = {name: tuple(tensor.shape) for name, tensor in beside.items()}
    load = partial(_beside, row, collate, config, shapes)
    return Encoded(inputs, images=ImageInputs(load=load, digest=digest.hexdigest(), shapes=shapes))


def _beside(row: Row, collate: Collate, config: CalibrationConfig, names: Iterable[str]) -> dict[str, Tensor]:
    batch = _collated(row, collate, config)
    return {name: batch[name] for name in names}


def _collated(row: Row, collate: Collate, config: CalibrationConfig) -> dict[str, Tensor]:
    for column in ("messages", "prompt", "completion", config.dataset_text_field):
        if column in row:
            (messages_in if isinstance(row[column], list) else string_in)(row, column)
    decoded = _decoded(row)
    try:
        return dict(collate([decoded]))
    except Exception as error:  # processors and chat templates raise whatever they meet
        raise BadRowError(f"does not go through the model's processor: {reason(error)}") from error


def _decoded(row: Row) -> Row:
    """A copy with its images as PIL has them."""
    return row | {
        column: [_opened(each) for each in row[column]] if isinstance(row[column], list) else _opened(row[column])
        for column in _COLUMNS
        if column in row
    }


def _opened(stored: Row) -> Any:
    import datasets

    try:
        return datasets.Image().decode_example(stored)
    except Exception as error:  # PIL's decoders raise whatever they meet
        raise BadRowError(f"has the image {stored['path']}, which cannot be read: {reason(error)}") from error
