"""The model card: the metadata that the hub reads, and the base that it tells a reader to load."""

from __future__ import annotations

import json
from typing import Any

import yaml
from builders import report_tree

from loraga_dist.artifacts.report import Report
from loraga_dist.publish.card import model_card

REPO = "someone/start"
PUSHED = {"push_to_hub": REPO, "push_residual_base": True, "residual_base": "full"}


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


def test_a_local_base_is_not_named_as_one_of_the_hub() -> None:
    _, text = card(init={"scheme": "rrr"}, model={"name_or_path": "/models/gpt2"})
    assert 'from_pretrained("PATH_OF_THE_BASE", dtype="auto")' in text and '"gpt2"' not in text
    assert "is not on the hub under this name" in text
    _, text = card(output=PUSHED, model={"name_or_path": "/models/gpt2"})
    assert "is not on the hub" not in text and "PATH_OF_THE_BASE" not in text


def test_the_offset_is_merged_in_the_dtype_of_the_residual() -> None:
    _, text = card(output={"residual_dtype": "float32"})
    assert 'from_pretrained("company/base", dtype="float32")' in text
    _, text = card(output={"residual_dtype": "float32", **PUSHED}, model={"trust_remote_code": True})
    assert f'from_pretrained("{REPO}", subfolder="residual_base", trust_remote_code=True, dtype="auto")' in text
