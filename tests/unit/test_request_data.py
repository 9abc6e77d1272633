"""Data held against the model: what batches are padded with has an embedding, and labels have a class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import ENCODER, VOCABULARY, byte_tokenizer, config_tree, save_class, save_data, save_model
from outputs import make_output
from safetensors.torch import load_file

from loraga_dist.config import InitConfig, parse_config
from loraga_dist.errors import UserError
from loraga_dist.model.shape import max_positions
from loraga_dist.model.targets import meta_copy
from loraga_dist.ranks.world import World
from loraga_dist.request.request import understand


def test_a_padding_token_that_the_tokenizer_alone_has_changes_nothing(tmp_path: Path) -> None:
    """As after `add_special_tokens` without `resize_token_embeddings`."""
    model, data = save_model(tmp_path / "model"), save_data(tmp_path / "data.jsonl")

    def adapter(name: str) -> dict[str, torch.Tensor]:
        out = make_output(config_tree(model, data, tmp_path / name))
        return load_file(out / "loraga_init" / "adapter_model.safetensors")

    expected = adapter("padded")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == VOCABULARY
    tokenizer.save_pretrained(model)
    found = adapter("padded by another")
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


@pytest.mark.parametrize(("own", "says"), [(-1, "pad_token_id -1, which has no embedding"), (None, "no pad_token_id")])
def test_batches_of_a_classifier_need_a_padding_id_of_its_own(own: int | None, says: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "bert")
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"pad_token_id": own}))
    data = save_data(tmp_path / "data.jsonl", "SEQ_CLS")

    def request(**calibration: Any) -> Any:
        tree = config_tree(model, data, tmp_path / "out", kind="bert", calibration=calibration)
        return understand(parse_config(InitConfig, tree), World.alone())

    with pytest.raises(UserError, match=f"the model's config has {says}: a classifier needs one for batches; write 1"):
        request()
    assert request(per_device_batch_size=1).data.num_samples == 24


def test_a_class_that_the_model_does_not_know(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "bert")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": "of some class", "label": label}) + "\n" for label in (0, 3)))
    tree = config_tree(model, data, tmp_path / "out", kind="bert")
    with pytest.raises(UserError, match="^calibration.label_field: 'label': holds class 3; classes go from 0 to 2"):
        understand(parse_config(InitConfig, tree), World.alone())


@pytest.mark.parametrize(
    ("family", "most"), [("Bert", 64), ("Bart", 64), ("Roberta", 62), ("MPNet", 62), ("IBert", 62), ("Longformer", 62)]
)
def test_as_many_tokens_as_the_model_itself_takes(family: str, most: int) -> None:
    """RoBERTa and its kind have two rows of position embeddings that no token of a text gets."""
    model_class = getattr(transformers, f"{family}ForSequenceClassification")
    model = model_class(model_class.config_class(**ENCODER | {"pad_token_id": 1, "attention_window": 16})).eval()
    assert max_positions(meta_copy(model_class, model.config)) == max_positions(model) == most
    model(torch.full((1, most), 257))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, most + 1), 257))


def test_a_text_of_more_tokens_than_positions_is_refused(tmp_path: Path) -> None:
    model = save_class(tmp_path / "model", "RobertaForSequenceClassification", **ENCODER | {"pad_token_id": 1})
    data = tmp_path / "data.jsonl"
    config = parse_config(InitConfig, config_tree(model, data, tmp_path / "out", kind="bert"))
    data.write_text(json.dumps({"text": "x" * 62, "label": 0}))
    assert understand(config, World.alone()).amount.num_tokens == 62
    data.write_text(json.dumps({"text": "x" * 63, "label": 0}))
    with pytest.raises(UserError, match="has 63 tokens but the model has 62 positions; write 62 or less"):
        understand(config, World.alone())
