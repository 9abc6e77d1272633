"""Which class a checkpoint is loaded with, from its config.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from loraga_dist.config import ModelConfig
from loraga_dist.errors import UserError
from loraga_dist.model.base import BaseModel, find_base_model
from loraga_dist.model.classes import loader_of


def find(directory: Path, kind: str, architecture: str | None, task: Any = "CAUSAL_LM", **keys: Any) -> BaseModel:
    config = AutoConfig.for_model(kind, dtype="float32")
    config.architectures = None if architecture is None else [architecture]
    config.save_pretrained(directory)
    model = ModelConfig.model_validate({"name_or_path": str(directory)} | keys)
    return find_base_model(model, task, torch.device("cpu"), needs_weights=False)


@pytest.mark.parametrize(
    ("kind", "architecture", "expected", "stated"),
    [
        ("llama", "LlamaForCausalLM", "LlamaForCausalLM", None),
        ("llama", None, "LlamaForCausalLM", None),
        ("llama", "LlamaModel", "LlamaForCausalLM", None),
        ("llama", "LlamaForSequenceClassification", "LlamaForCausalLM", None),
        ("bart", "BartForConditionalGeneration", "BartForCausalLM", None),
        ("gemma3", "Gemma3ForConditionalGeneration", "Gemma3ForConditionalGeneration", None),
        ("llama4", *["Llama4ForConditionalGeneration"] * 3),
        ("llama4", "Llama4ForCausalLM", "Llama4ForCausalLM", None),
        ("llama4", None, "Llama4ForCausalLM", None),
        ("qwen3_vl", None, "Qwen3VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"),
        ("mistral3", "Mistral3ForConditionalGeneration", *["Mistral3ForConditionalGeneration"] * 2),
    ],
)
def test_the_class_is_what_config_json_names_or_transformers_has(
    kind: str, architecture: str | None, expected: str, stated: str | None, tmp_path: Path
) -> None:
    base = find(tmp_path, kind, architecture)
    assert (base.model_class.__name__, base.class_name) == (expected, stated)
    model_class: Any = base.model_class
    assert isinstance(base.config, model_class.config_class)
    found = ModelConfig.model_validate({"name_or_path": "x", "class": base.class_name})
    assert loader_of(found, "CAUSAL_LM") == (stated or "AutoModelForCausalLM")
    again = find(tmp_path, kind, architecture, **{"class": stated})
    assert again.model_class is base.model_class


def test_of_several_classes_the_user_takes_one(tmp_path: Path) -> None:
    base = find(tmp_path, "llama4", "Llama4ForConditionalGeneration", **{"class": "Llama4ForCausalLM"})
    assert (base.model_class.__name__, type(base.config).__name__) == ("Llama4ForCausalLM", "Llama4TextConfig")
    assert base.class_name == "Llama4ForCausalLM"
    with pytest.raises(UserError) as refused:
        find(tmp_path, "llama4", None, **{"class": "LlamaForCausalLM"})
    assert str(refused.value) == (
        "model.class: 'LlamaForCausalLM': is no class for Llama4Config and CAUSAL_LM; "
        "write one of Llama4ForCausalLM, Llama4ForConditionalGeneration"
    )


@pytest.mark.parametrize(
    ("kind", "task", "said"),
    [
        ("t5", "CAUSAL_LM", "T5Config is of an encoder and a decoder; write SEQ_2_SEQ_LM"),
        ("t5gemma2", "CAUSAL_LM", "write SEQ_2_SEQ_LM"),
        ("clip", "CAUSAL_LM", "CLIPConfig has no .*; write a model that has one"),
        ("llama4", "SEQ_CLS", "Llama4Config has no AutoModelForSequenceClassification; write CAUSAL_LM"),
    ],
)
def test_a_model_without_a_class_for_the_task_is_refused(kind: str, task: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as refused:
        find(tmp_path, kind, None, task)
    assert refused.value.key == "lora.task_type"
