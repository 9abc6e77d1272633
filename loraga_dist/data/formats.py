"""Rows of data to model inputs and labels, by their columns: text, prompt-completion, chat, Alpaca, ShareGPT, classes.

Token ids and labels are those TRL's SFTTrainer would train on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, tzinfo
from functools import partial
from typing import TYPE_CHECKING, Any

from loraga_dist.config import CalibrationConfig, TaskType
from loraga_dist.data.losses import IGNORED
from loraga_dist.errors import UserError, blame, reason

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Inputs = dict[str, Any]
"""Lists of integers by input name; for SEQ_CLS `labels` is one integer."""

# the prompts of github.com/tatsu-lab/stanford_alpaca, train.py
_ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


@contextmanager
def clock_at(time: datetime) -> Iterator[None]:
    """Let chat templates print this time while the block lasts; transformers gives them no other clock."""
    from transformers.utils import chat_template_utils

    module: Any = chat_template_utils

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return time

    running, module.datetime = module.datetime, Stopped
    try:
        yield
    finally:
        module.datetime = running


class BadRowError(ValueError):
    """What is wrong with the row at hand; `load_samples` adds which one it is."""


def data_source(config: CalibrationConfig) -> tuple[str, Any]:
    """The key that names the data, and its value."""
    if config.data_files:
        return "calibration.data_files", config.data_files
    return "calibration.dataset_name", config.dataset_name


def data_error(config: CalibrationConfig, problem: str) -> UserError:
    return UserError(*data_source(config), problem)


def supervised_encoder(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    task_type: TaskType,
) -> Callable[[Row], Inputs]:
    """How rows become inputs, from the task and the columns; refuses data that cannot serve before the work starts."""
    columns = dataset.column_names
    if task_type == "SEQ_CLS":
        _require_column(columns, "calibration.dataset_text_field", config.dataset_text_field)
        _require_column(columns, "calibration.label_field", config.label_field)
        refuse_assistant_only_loss(config, "belongs to CAUSAL_LM")
        return partial(_classification_inputs, config=config, tokenizer=tokenizer)

    with blame(*data_source(config), "sample 0 cannot be read", "mend or remove it"):
        first = _trl_row(dataset[0], config.dataset_text_field)
    if task_type == "SEQ_2_SEQ_LM":
        if not _is_prompt_completion(first):
            raise data_error(
                config, f"has no columns prompt and completion, which SEQ_2_SEQ_LM needs; it has {', '.join(columns)}"
            )
        refuse_assistant_only_loss(config, "belongs to CAUSAL_LM")
        return partial(_sequence_to_sequence_inputs, config=config, tokenizer=tokenizer)

    if not _is_prompt_completion(first):
        if config.completion_only_loss:
            raise UserError("calibration.completion_only_loss", True, "needs columns prompt and completion; write null")
        if "messages" not in first:
            _require_column(columns, "calibration.dataset_text_field", config.dataset_text_field)
    chat_template = None
    if "messages" in first or isinstance(first.get("prompt"), list):
        chat_template = training_chat_template(config, tokenizer)
    else:
        refuse_assistant_only_loss(config, "needs conversations, and this data is plain text")
    return partial(causal_inputs, config=config, tokenizer=tokenizer, chat_template=chat_template)


def _require_column(columns: list[str], key: str, column: str) -> None:
    if column not in columns:
        raise UserError(key, column, f"is no column of the data; the columns are {', '.join(columns)}")


def refuse_assistant_only_loss(config: CalibrationConfig, problem: str) -> None:
    if config.assistant_only_loss:
        raise UserError("calibration.assistant_only_loss", True, f"{problem}; write false")


def training_chat_template(config: CalibrationConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template to use in place of the tokenizer's own when assistant tokens must be marked and are not."""
    if tokenizer.chat_template is None:
        raise data_error(
            config,
            "holds conversations, but the tokenizer has no chat template; write prompt and completion as strings",
        )
    if not config.assistant_only_loss:
        return None
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise UserError(
            "calibration.assistant_only_loss",
            True,
            "the tokenizer's chat template has no {% generation %} markers and TRL knows no version of it that has; "
            "add them to the template or write false",
        ) from error


def _trl_row(row: Row, text_field: str) -> Row:
    """ShareGPT and Alpaca rows in the columns that TRL trains on; other rows as they are."""
    if isinstance(row.get("conversations"), list):
        from trl.data_utils import maybe_convert_to_chatml

        return maybe_convert_to_chatml(row)
    if {"instruction", "output"} <= row.keys() and not row.keys() & {"prompt", "messages", text_field}:
        prompt = _ALPACA_PROMPT_WITH_INPUT if row.get("input") else _ALPACA_PROMPT
        return {"prompt": prompt.format_map(row), "completion": row["output"]}
    return row


def _is_prompt_completion(row: Row) -> bool:
    return "prompt" in row and "completion" in row


def causal_inputs(
    row: Row, *, config: CalibrationConfig, tokenizer: PreTrainedTokenizerBase, chat_template: str | None
) -> Inputs:
    """One row of `SFTTrainer._prepare_dataset` (TRL 1.16): its tokens, masks and truncation."""
    row = _trl_row(row, config.dataset_text_field)
    masks: list[list[int]] = []
    fill = partial(_fill, num_tokens=config.max_length + MARGIN)
    plain = partial(fill, partial(tokenizer, verbose=False))
    render = partial(fill, partial(_render, tokenizer=tokenizer, row=row, chat_template=chat_template))
    if _is_prompt_completion(row):
        prompt_ids, tokens = _tokenize_prompt_completion(row, tokenizer, plain, render, config.assistant_only_loss)
        if config.completion_only_loss is not False:
            masks.append(_completion_mask(prompt_ids, tokens["input_ids"]))
    elif "messages" in row:
        tokens = render(messages_in(row, "messages"), return_assistant_tokens_mask=config.assistant_only_loss)
    else:
        tokens = plain(_with_eos(string_in(row, config.dataset_text_field), tokenizer))
    if config.assistant_only_loss:
        masks.append(tokens["assistant_masks"])

    token_ids = tokens["input_ids"]
    labels = [token_id if all(bits) else IGNORED for token_id, *bits in zip(token_ids, *masks, strict=True)]
    token_ids, labels = token_ids[: config.max_length], labels[: config.max_length]
    return {"input_ids": token_ids, "attention_mask": [1] * len(token_ids), "labels": labels}


CHARACTERS_PER_TOKEN = 256
MARGIN = 64
"""Tokens behind the last one that is kept: those at a cut depend on what follows it."""


def _fill(encode: Callable[..., Mapping[str, Any]], text: Any, *, num_tokens: int, **kwargs: Any) -> Mapping[str, Any]:
    """Tokens of a text, or of a conversation's texts: only of their beginnings where these make so many already.

    A text of 30 MB of which 32 tokens are kept would take a minute.
    """
    start = _cut(text, CHARACTERS_PER_TOKEN * num_tokens)
    if start != text:
        tokens = encode(start, **kwargs)
        if len(tokens["input_ids"]) >= num_tokens:
            return tokens
    return encode(text, **kwargs)


def _cut(value: Any, num_characters: int) -> Any:
    """The same with shorter strings, whatever holds them."""
    if isinstance(value, str):
        return value[:num_characters]
    if isinstance(value, list):
        return [_cut(part, num_characters) for part in value]
    if isinstance(value, dict):
        return {key: _cut(part, num_characters) for key, part in value.items()}
    return value


def _tokenize_prompt_completion(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    plain: Callable[[str], Mapping[str, Any]],
    render: Callable[..., Mapping[str, Any]],
    assistant_only_loss: bool,
) -> tuple[list[int], Mapping[str, Any]]:
    """Token ids of the prompt alone, and the tokens of prompt and completion together."""
    if isinstance(row["prompt"], list):
        prompt = messages_in(row, "prompt")
        together = render(prompt + messages_in(row, "completion"), return_assistant_tokens_mask=assistant_only_loss)
        return render(prompt, add_generation_prompt=True)["input_ids"], together
    prompt = string_in(row, "prompt")
    together = plain(prompt + _with_eos(string_in(row, "completion"), tokenizer))
    return plain(prompt)["input_ids"], together


def _completion_mask(prompt_ids: list[int], token_ids: list[int]) -> list[int]:
    """1 from where the tokens leave the prompt's: its last ones may change once the completion follows."""
    from trl.data_utils import common_prefix_length

    prompt_length = common_prefix_length(prompt_ids, token_ids)
    return [0] * prompt_length + [1] * (len(token_ids) - prompt_length)


def _render(
    messages: list[Row], *, tokenizer: PreTrainedTokenizerBase, row: Row, chat_template: str | None, **kwargs: Any
) -> Mapping[str, Any]:
    tools = row.get("tools")
    try:
        tokens = tokenizer.apply_chat_template(
            messages,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            chat_template=chat_template,
            tokenize=True,
            return_dict=True,
            **(row.get("chat_template_kwargs") or {}),
            **kwargs,
        )
    except Exception as error:  # a template divides by zero, calls itself, or takes too long
        raise BadRowError(f"does not go through the chat template: {reason(error)}") from error
    assert isinstance(tokens, Mapping)
    return tokens


def _sequence_to_sequence_inputs(row: Row, *, config: CalibrationConfig, tokenizer: PreTrainedTokenizerBase) -> Inputs:
    """Encoder inputs from the prompt, labels from the completion; the tokenizer truncates, to keep its end token."""
    row = _trl_row(row, config.dataset_text_field)
    source, target = string_in(row, "prompt"), string_in(row, "completion")
    encode = partial(tokenizer, truncation=True, max_length=config.max_length)
    labels = _truncated(lambda text: encode(text_target=text), target, tokenizer, config)["input_ids"]
    return {**_truncated(encode, source, tokenizer, config), "labels": labels}


def _truncated(
    encode: Callable[..., Mapping[str, Any]], text: str, tokenizer: PreTrainedTokenizerBase, config: CalibrationConfig
) -> Mapping[str, Any]:
    """Tokens of a text that the tokenizer truncates: of its beginning where that is what it keeps."""
    return encode(text) if tokenizer.truncation_side != "right" else _fill(encode, text, num_tokens=config.max_length)


def _classification_inputs(row: Row, *, config: CalibrationConfig, tokenizer: PreTrainedTokenizerBase) -> Inputs:
    label = row[config.label_field]
    if not isinstance(label, int) or isinstance(label, bool):
        raise UserError(
            "calibration.label_field", config.label_field, f"holds {label!r}; labels must be integer classes"
        )
    if label < 0:
        raise UserError("calibration.label_field", config.label_field, f"holds class {label}; classes go from 0")
    text = string_in(row, config.dataset_text_field)
    encode = partial(tokenizer, truncation=True, max_length=config.max_length)
    return {**_truncated(encode, text, tokenizer, config), "labels": label}


def _with_eos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    eos = tokenizer.eos_token
    return text if not isinstance(eos, str) or text.endswith(eos) else text + eos


def string_in(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise BadRowError(f"holds {value!r} in column {column}; it must be a string")
    return value


def messages_in(row: Row, column: str) -> list[Row]:
    value = row.get(column)
    if not (isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value)):
        raise BadRowError(f"holds {value!r} in column {column}; it must be a list of messages with role and content")
    return value
