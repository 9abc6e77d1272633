"""How much of a model is said to get an adapter, against counts of stock PEFT's own model."""

from __future__ import annotations

from typing import Any

import pytest
from builders import make_model
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer

from loraga_dist.config import LoraSection
from loraga_dist.model.coverage import Coverage
from loraga_dist.model.selection import select_targets
from loraga_dist.model.targets import meta_copy


def coverage(kind: str, **lora: Any) -> Coverage:
    model: Any = make_model(kind)
    return select_targets(meta_copy(type(model), model.config), LoraSection(r=2, **lora), lambda r: r).coverage


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_all_linear_covers_what_peft_adapts(kind: str) -> None:
    found, model = coverage(kind), make_model(kind)
    assert found.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))  # type: ignore[arg-type]
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    assert found.num_covered == sum(layer.get_base_layer().weight.numel() for layer in layers)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert", "mixtral", "olmoe"])
def test_every_matrix_is_covered_or_named(kind: str) -> None:
    found, model = coverage(kind, target_modules="all-linear", task_type=_task(kind)), make_model(kind)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    assert found.num_covered + found.num_trained_whole + sum(found.left_out.values()) >= matrices
    assert found.num_covered + sum(found.left_out.values()) <= matrices


def test_what_is_left_out_is_said_by_kind() -> None:
    found = coverage("mixtral", target_modules=["q_proj"])
    assert list(found.left_out)[0] == "experts"
    assert {"embeddings", "output head", "k_proj", "v_proj", "o_proj"} < found.left_out.keys()
    assert "q_proj" not in found.left_out
    assert "without adapter: experts " in found.text and " %)" in found.text
    with_experts = coverage("mixtral", target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    assert "experts" not in with_experts.left_out


def test_what_trains_whole_is_not_left_out() -> None:
    found = coverage("llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert found.num_trained_whole == coverage("llama").left_out["output head"]
    assert "output head" not in found.left_out and "trained whole: " in found.text


def _task(kind: str) -> str:
    return {"t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}.get(kind, "CAUSAL_LM")
