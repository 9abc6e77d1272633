"""Preferences (chosen, rejected) and completions with a reward or advantage: supervised sequences, each with a weight.

At the start the policy is the reference, and the one that sampled. There the gradients of DPO and of GRPO are those of
a weighted cross-entropy (docs/METHOD.md), and no second model is needed.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from loraga_dist.config import CalibrationConfig, TaskType
from loraga_dist.data.formats import (
    BadRowError,
    Inputs,
    Row,
    causal_inputs,
    data_error,
    data_source,
    messages_in,
    refuse_assistant_only_loss,
    string_in,
    supervised_encoder,
    training_chat_template,
)
from loraga_dist.data.images import ImageInputs
from loraga_dist.data.losses import DPO_BETA, IGNORED
from loraga_dist.errors import UserError, blame

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_STD_FLOOR = 1e-4
"""Added to the standard deviation of a prompt's rewards, as in TRL's GRPOTrainer."""
_LARGEST = 1e30
"""float32 holds its product with a loss."""


@dataclass(frozen=True)
class Encoded:
    """What a row becomes: model inputs without padding, `labels` with -100 where there is no loss."""

    inputs: Inputs
    """Of a pair, with the chosen completion."""
    rejected: Inputs | None = field(default=None, kw_only=True)
    """Of a pair, with the rejected one."""
    weight: float | None = field(default=None, kw_only=True)
    """Of the loss on `inputs`; less that, of the loss on `rejected`. None: 1."""
    images: ImageInputs | None = field(default=None, kw_only=True)

    @property
    def sequences(self) -> list[Inputs]:
        return [self.inputs] if self.rejected is None else [self.inputs, self.rejected]

    @property
    def weights(self) -> list[float]:
        """Of each sequence's loss."""
        weight = 1.0 if self.weight is None else self.weight
        return [weight] if self.rejected is None else [weight, -weight]


def encoder(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    task_type: TaskType,
) -> Callable[[Row], Encoded | None]:
    """How rows become samples, from the task and the columns; None for a row whose weight is 0.

    Refuses data that cannot serve before the work starts.
    """
    pair, sampled = _feedback(config, set(dataset.column_names), task_type)
    if pair:
        return _preference_encoder(config, tokenizer, dataset)
    encode = supervised_encoder(config, tokenizer, dataset, task_type)
    if sampled is None:
        return lambda row: Encoded(encode(row))
    advantage = _given_advantage if sampled == "advantage" else _group_advantage(config, dataset)

    def encode_sampled(row: Row) -> Encoded | None:
        weight = advantage(row)
        return Encoded(encode(row), weight=weight) if weight else None

    return encode_sampled


def _feedback(config: CalibrationConfig, columns: set[str], task_type: TaskType) -> tuple[bool, str | None]:
    """Whether rows are pairs, and the column with what their completions are worth, if one has it."""
    pair = columns & {"chosen", "rejected"}
    worth = sorted(columns & {"advantage", "reward"})
    if task_type == "SEQ_CLS" and not pair:
        return False, None  # columns of any name may stand beside text and label
    if not pair and not worth:
        return False, None
    named = ", ".join(sorted(columns))
    if task_type != "CAUSAL_LM":
        raise data_error(config, f"has the columns {named}; {' and '.join(sorted(pair) or worth)} need CAUSAL_LM")
    if len(pair) == 1:
        raise data_error(config, f"has the columns {named}; preference data has both chosen and rejected")
    if pair and (mixed := sorted(columns & {"completion", "advantage", "reward"})):
        raise data_error(config, f"has chosen and rejected, and also {', '.join(mixed)}; remove the ones or the others")
    if len(worth) == 2:
        raise data_error(config, "has both advantage and reward; remove the one that is not to be used")
    if worth and not {"prompt", "completion"} <= columns:
        raise data_error(
            config,
            f"has the columns {named}; {worth[0]} needs prompt and completion beside it: write these, or remove it",
        )
    refuse_assistant_only_loss(config, "belongs to supervised data")
    if config.completion_only_loss is False:
        raise UserError(
            "calibration.completion_only_loss",
            False,
            f"{'/'.join(sorted(pair) or worth)} is of completions; write null",
        )
    return bool(pair), worth[0] if worth else None


def _preference_encoder(
    config: CalibrationConfig, tokenizer: PreTrainedTokenizerBase, dataset: Dataset
) -> Callable[[Row], Encoded]:
    with blame(*data_source(config), "sample 0 cannot be read", "mend or remove it"):
        first = _with_prompt(dataset[0])
    if isinstance(first["prompt"], list):
        training_chat_template(config, tokenizer)  # refuses a tokenizer without one
    encode = partial(causal_inputs, config=config, tokenizer=tokenizer, chat_template=None)
    return partial(_pair, encode=encode)


def _pair(row: Row, *, encode: Callable[[Row], Inputs]) -> Encoded:
    """One row of `DPOTrainer._prepare_dataset` (TRL 1.16), and of its collator: tokens, masks and truncation.

    Of two completions that are the same no token is learnt from.
    """
    row = _with_prompt(row)
    read = messages_in if isinstance(row["prompt"], list) else string_in
    given = {key: row[key] for key in ("prompt", "tools", "chat_template_kwargs") if key in row}
    pair = [encode(given | {"completion": read(row, column)}) for column in ("chosen", "rejected")]
    # where a prompt's last token merges into one completion alone, it is part of both
    start = min(_num_ignored(inputs["labels"]) for inputs in pair)
    if pair[0]["input_ids"] == pair[1]["input_ids"]:  # perhaps by truncation: their gradients cancel but for rounding
        start = len(pair[0]["input_ids"])
    chosen, rejected = (inputs | {"labels": [IGNORED] * start + inputs["input_ids"][start:]} for inputs in pair)
    return Encoded(chosen, rejected=rejected, weight=DPO_BETA / 2)


def _with_prompt(row: Row) -> Row:
    """The row; where it has no prompt, what both conversations or texts begin with, as DPOTrainer takes it."""
    if "prompt" in row:
        return row
    from trl.data_utils import extract_prompt

    read = messages_in if isinstance(row["chosen"], list) else string_in
    for column in ("chosen", "rejected"):
        if not read(row, column):
            raise BadRowError(f"holds {row[column]!r} in column {column}; without a prompt it must not be empty")
    return row | extract_prompt(row)


def _num_ignored(labels: list[int]) -> int:
    """Before the first that has a loss."""
    return next((index for index, label in enumerate(labels) if label != IGNORED), len(labels))


def _number(value: Any, column: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _LARGEST:
        raise BadRowError(f"holds {value!r} in column {column}; it must be a number, of {_LARGEST:g} at most")
    return float(value)


def _given_advantage(row: Row) -> float:
    return _number(row["advantage"], "advantage")


def _group_advantage(config: CalibrationConfig, dataset: Dataset) -> Callable[[Row], float]:
    """(reward - mean) / (std + 1e-4) within the rows of the same prompt, as TRL's GRPOTrainer has it (`scale_rewards`
    at its default)."""
    rewards: dict[str, list[float]] = defaultdict(list)
    for number, (prompt, reward) in enumerate(zip(dataset["prompt"], dataset["reward"], strict=True)):
        try:
            rewards[_key(prompt)].append(_number(reward, "reward"))
        except BadRowError as problem:
            raise data_error(config, f"sample {number} {problem}") from problem
    # exact sums: equal rewards give 0, and such rows have nothing to learn from
    scales = {
        key: (statistics.mean(values), statistics.stdev(values) + _STD_FLOOR)
        for key, values in rewards.items()
        if len(values) > 1
    }

    def advantage(row: Row) -> float:
        mean, scale = scales.get(_key(row["prompt"]), (row["reward"], 1.0))  # of a prompt's only completion: 0
        return (row["reward"] - mean) / scale

    return advantage


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True, default=str)
