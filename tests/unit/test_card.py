"""The model card: the metadata that the hub reads, and the base that it tells a reader to load."""

from __future__ import annotations

import json
from typing import Any

import yaml
from builders import report_tree

from loraga_dist.artifacts.report import Report
from loraga_dist.publish.card import model_card

REPO = "someone/start"


def card(**config: Any) -> tuple[dict[str, Any], str]:
    """Metadata and text."""
    _, metadata, text = model_card(Report.parse(json.dumps(report_tree(config=config))), REPO).split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_a_base_of_the_hub_is_named_with_its_commit() -> None:
    metadata, text = card(model={"revision": "abc123"}, lora={"task_type": "SEQ_CLS"})
    assert metadata == {"base_model": "company/base", "library_name": "peft", "tags": ["lora", "lora-ga"]}
    assert 'AutoModelForSequenceClassification.from_pretrained("company/base", revision="abc123", dtype="auto")' in text
    assert f'PeftModel.from_pretrained(base, "{REPO}", subfolder="loraga_offset").merge_and_unload()' in text
    assert "sha256:1" in text and "model is wrong" in text


def test_an_unchanged_base_needs_no_offset() -> None:
    metadata, text = card(init={"scheme": "lora_one"}, model={"name_or_path": "/scratch/my`base"})
    assert metadata == {"library_name": "peft", "tags": ["lora", "lora-one"]}
    assert "loraga_offset" not in text and "residual" not in text
    assert "belongs on `` my`base `` as it is" in text
    assert "On another model of the same shapes" in text


def test_a_dora_becomes_a_merged_model() -> None:
    assert "As a merged model, from a copy" in card(lora={"use_dora": True})[1]
    assert "--to CONVERTED" in card()[1]
