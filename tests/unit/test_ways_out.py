"""Whoever writes what the message says gets a start: of models that cannot be taken as they are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import SPECIAL_IDS, VOCABULARY, config_tree, save_class, save_data
from outputs import read_report, write_config

from loraga_dist.cli import init_main

TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, **SPECIAL_IDS,
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
    "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "max_position_embeddings": 64,
    "num_labels": 8, **SPECIAL_IDS,
}  # fmt: skip
AUDIO = {
    "d_model": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 8,
    "max_source_positions": 16,
}  # fmt: skip
DISTILBERT = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "num_labels": 8}


def make_tree(directory: Path, class_name: str, task: str, values: dict[str, Any]) -> dict[str, Any]:
    model, data = (
        save_class(directory / "model", class_name, **values),
        save_data(directory / "data.jsonl", task, rows=4),
    )
    return config_tree(model, data, directory / "out", lora={"r": 2, "task_type": task})


def said(tree: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    assert init_main(["--config", str(write_config(tree))]) == 2
    (line,) = [line for line in capsys.readouterr().err.split("\n") if line.startswith("loraga-dist: ")]
    return line


@pytest.mark.parametrize(
    ("class_name", "task", "values", "problems"),
    [
        # PEFT trains what ends like a head whole
        ("DistilBertForSequenceClassification", "SEQ_CLS", DISTILBERT, ["trained whole by PEFT"]),
        # fused kernels read both weights without the modules
        (
            "MambaForCausalLM",
            "CAUSAL_LM",
            TEXT | {"state_size": 4, "time_step_rank": 8},
            ["refused by PEFT in such a model", "no part in the"],
        ),
        # the decoder has cross-attention, and nothing to attend to
        ("BartForCausalLM", "CAUSAL_LM", BART, ["took no part in the loss"]),
        (
            "VoxtralForConditionalGeneration",
            "SEQ_2_SEQ_LM",
            {"text_config": TEXT | {"model_type": "llama"}, "audio_config": AUDIO},
            ["VoxtralConfig is of a decoder alone; write CAUSAL_LM"],
        ),
    ],
)
def test_what_is_said_to_be_written_works(
    class_name: str,
    task: str,
    values: dict[str, Any],
    problems: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree = make_tree(tmp_path, class_name, task, values)
    for problem in problems:
        line = said(tree, capsys)
        assert problem in line
        if "write lora." in line:  # a pattern, whole
            key, pattern = re.fullmatch(r".*; write lora\.(\w+): (.*)", line).groups()  # type: ignore[union-attr]
            tree["lora"][key] = yaml.safe_load(pattern)
        else:
            tree["lora"]["task_type"] = line.rpartition(" ")[2]
    assert init_main(["--config", str(write_config(tree))]) == 0
    assert read_report(tmp_path / "out")["targets"]


def test_a_classifier_that_reads_at_the_end_of_sequence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = make_tree(tmp_path, "BartForSequenceClassification", "SEQ_CLS", BART)
    assert "sample" in (line := said(tree, capsys)) and "has none; end texts with it" in line
    rows = [{"text": f"{letter * 5}{'</s>' * (1 + label)}", "label": label} for label, letter in enumerate("abcd")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "must have equally many; write 1" in said(tree, capsys)
    tree["calibration"]["per_device_batch_size"] = 1
    assert init_main(["--config", str(write_config(tree))]) == 0


def test_a_classifier_of_no_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = make_tree(tmp_path, "BartForSequenceClassification", "SEQ_CLS", BART | {"num_labels": 1})
    tree["lora"]["exclude_modules"] = ["classification_head.out_proj"]
    line = said(tree, capsys)
    assert "has num_labels 1" in line and "write pissa, olora, kaiming, and no data" in line
    tree["init"] = {"scheme": "pissa"}
    del tree["calibration"], tree["gradient"]
    assert init_main(["--config", str(write_config(tree))]) == 0
