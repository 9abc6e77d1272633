"""What the examples share: data in all formats of calibration, and the warning of a learning rate that is too high."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from builders import byte_tokenizer
from launching import ROOT

from loraga_dist.config import CalibrationConfig

FROM_START: dict[str, Any] = runpy.run_path(str(ROOT / "examples" / "from_start.py"))
TEMPLATE = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }};{% endfor %}"

USER, ASSISTANT = {"role": "user", "content": "how?"}, {"role": "assistant", "content": "so"}
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nhow?\n\n### Response:"
)
FORMATS = {
    "text": ({"text": "as it is"}, "as it is</s>", "as it is</s>"),
    "prompt-completion": ({"prompt": "how?", "completion": "so"}, "how?so</s>", "so</s>"),
    "chat-prompt-completion": (
        {"prompt": [USER], "completion": [ASSISTANT]},
        "<user>how?;<assistant>so;",
        "<assistant>so;",
    ),
    "messages": ({"messages": [USER, ASSISTANT]}, "<user>how?;<assistant>so;", "<user>how?;<assistant>so;"),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "how?"}, {"from": "gpt", "value": "so"}]},
        "<human>how?;<gpt>so;",  # roles as TRL leaves them
        "<human>how?;<gpt>so;",
    ),
    "alpaca": ({"instruction": "how?", "input": "", "output": "so"}, f"{ALPACA_PROMPT}so</s>", "so</s>"),
}
"""A row, all that the model reads of it, and what has a loss."""


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_calibration_trains(name: str, tmp_path: Path) -> None:
    row, reads, learns = FORMATS[name]
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    of_the_start = CalibrationConfig(dataset_name="elsewhere", split="test", max_samples=1)
    samples = FROM_START["read_samples"](str(tmp_path / "data.jsonl"), of_the_start, tokenizer, 2)
    assert len(samples) == 2, "as many as the steps take"
    for sample in samples:
        assert tokenizer.decode(sample.inputs["input_ids"]) == reads
        assert tokenizer.decode([token for token in sample.inputs["labels"] if token != -100]) == learns


def test_settings_of_the_start_hold_for_training(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"body": "a long text"}) + "\n")
    settings = CalibrationConfig(dataset_text_field="body", max_length=4)
    (sample,) = FROM_START["read_samples"](str(tmp_path / "data.jsonl"), settings, byte_tokenizer(), 5)
    assert byte_tokenizer().decode(sample.inputs["input_ids"]) == "a lo"


def test_preferences_are_not_trained_on_as_if_all_were_chosen(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n")
    with pytest.raises(SystemExit, match="train with TRL's DPOTrainer"):
        FROM_START["read_samples"](str(tmp_path / "data.jsonl"), CalibrationConfig(), byte_tokenizer(), 5)


def test_data_that_is_not_there_ends_a_script_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^calibration\.data_files: .*nowhere\.jsonl.*$"):
        FROM_START["read_samples"](str(tmp_path / "nowhere.jsonl"), CalibrationConfig(), byte_tokenizer(), 5)


FALLS = [2.3, 2.0, 1.8, 2.1, 1.8, 2.0, 1.8, 1.9, 1.9, 2.0, 9.0, 9.0]


@pytest.mark.parametrize(
    ("losses", "warned_at"),
    [
        (FALLS, None),
        ([2.0, 2.2, 1.9, 2.1, 2.0, 2.1, 2.2, 1.9, 2.1, 2.1], None),  # as much as one batch differs from another
        ([2.0, 2.1, 2.2, 2.1, 2.3, 2.4, 2.5, 2.7, 2.8, 2.9, 2.9, 2.9], 10),
        ([2.0, 5.8, 5.8, 5.9, 4.7, 4.8, 4.1, 3.8, 3.6, 3.5], 10),  # at the first step, and then it comes back
        ([2.0, 2.1, 2.0, 2.1, 2.0, float("nan"), 2.0, 2.0, 2.0, 2.0], 10),
    ],
    ids=["falls", "scatters", "rises", "leaps", "nan"],
)
def test_a_rising_loss_is_said_once(losses: list[float], warned_at: int | None) -> None:
    first_losses = FROM_START["FirstLosses"](1e-3)
    lines = {step: line for step, loss in enumerate(losses, 1) if (line := first_losses.warning(loss))}
    assert list(lines) == ([] if warned_at is None else [warned_at])
    assert all("write a --learning_rate below 0.001" in line and "\n" not in line for line in lines.values())
