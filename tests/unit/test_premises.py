"""What calibration takes for granted is tried: padding that changes nothing, and a loss that is the model's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import (
    ENCODER,
    SPECIAL_IDS,
    VOCABULARY,
    byte_tokenizer,
    config_tree,
    make_model,
    save_class,
    save_data,
    save_model,
)
from outputs import make_output, read_factors, read_report, relative

import loraga_dist
from loraga_dist.engines.product import multiplies_bfloat16

DECODER = {
    "vocab_size": VOCABULARY, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
    "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "max_position_embeddings": 64,
    **SPECIAL_IDS,
}  # fmt: skip


def tree_of(directory: Path, model: Path, task: str, rows: int = 5, **sections: Any) -> dict[str, Any]:
    data = save_data(directory / "data.jsonl", task, rows=rows)
    sections["lora"] = {"r": 1, "task_type": task} | sections.get("lora", {})
    return config_tree(model, data, directory / "out", **sections)


def own_gradients(model: Path, data: Path, class_name: str) -> dict[str, torch.Tensor]:
    """Of a classifier's own loss, text by text, over as many tokens as they have."""
    loaded, tokenizer = getattr(transformers, class_name).from_pretrained(model).eval(), byte_tokenizer()
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        encoded = tokenizer(row["text"], return_tensors="pt")
        (loaded(**encoded, labels=torch.tensor([row["label"]])).loss / len(rows)).backward()
    return {name.removesuffix(".weight"): p.grad for name, p in loaded.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("class_name", "sees"),
    [
        ("FNetForSequenceClassification", True),
        ("ConvBertForSequenceClassification", True),
        ("ElectraForSequenceClassification", False),
    ],
)
def test_texts_go_one_by_one_where_a_model_sees_their_padding(class_name: str, sees: bool, tmp_path: Path) -> None:
    model = save_class(tmp_path / "model", class_name, **ENCODER)
    tree = tree_of(tmp_path, model, "SEQ_CLS")
    out = make_output(tree)
    report, factors = read_report(out), read_factors(out)
    said = [line for line in report["warnings"] if "padding" in line]
    assert [line.startswith(f"padding changes what {class_name} makes of a text") for line in said] == [True] * sees
    assert report["cautions"] == said
    expected = own_gradients(model, tmp_path / "data.jsonl", class_name)
    for name, target in report["targets"].items():
        k, truth = target["num_converged"], torch.linalg.svd(expected[name], full_matrices=False)
        U_MK, S_K, Vh_KN = (factors[f"{name}.{part}"] for part in ("U", "S", "Vh"))
        best = truth.U[:, :k] * truth.S[:k] @ truth.Vh[:k]
        assert relative(U_MK[:, :k] * S_K[:k] @ Vh_KN[:k], best) < 1e-4, name


@pytest.mark.parametrize(
    ("class_name", "task", "says"),
    [
        ("BartForCausalLM", "CAUSAL_LM", "the cross-entropy of every next token"),
        ("ProphetNetForConditionalGeneration", "SEQ_2_SEQ_LM", "the cross-entropy with the labels"),
        ("MBartForConditionalGeneration", "SEQ_2_SEQ_LM", None),
        ("OpenAIGPTLMHeadModel", "CAUSAL_LM", None),
    ],
)
def test_another_loss_of_a_models_own_is_said(class_name: str, task: str, says: str | None, tmp_path: Path) -> None:
    values: dict[str, Any] = dict(DECODER)
    if class_name.startswith("ProphetNet"):
        values = {
            "vocab_size": VOCABULARY, "hidden_size": 32, "max_position_embeddings": 300, "ngram": 2, **SPECIAL_IDS,
            **{f"num_{side}_{of}": 2 for side in ("encoder", "decoder") for of in ("layers", "attention_heads")},
            **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
        }  # fmt: skip
    if class_name.startswith("OpenAI"):
        values = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **SPECIAL_IDS}
    model = save_class(tmp_path / "model", class_name, **values)
    tree = tree_of(tmp_path, model, task, lora={"exclude_modules": ".*encoder_attn.*"} if "Bart" in class_name else {})
    if class_name.startswith("MBart"):
        del tree["lora"]["exclude_modules"]
    tree["calibration"]["per_device_batch_size"] = 1
    said = read_report(make_output(tree))["cautions"]
    assert len(said) == (says is not None)
    if says is not None:
        assert said[0].startswith(f"{class_name} gives another loss than {says}, of which the gradient is: ")


@pytest.mark.parametrize("is_decoder", [True, False])
def test_a_causal_model_that_reads_its_answers_is_said(is_decoder: bool, tmp_path: Path) -> None:
    model = save_class(tmp_path / "model", "BertLMHeadModel", **ENCODER, is_decoder=is_decoder)
    tree = tree_of(tmp_path, model, "CAUSAL_LM")
    said = [line for line in read_report(make_output(tree))["warnings"] if "see those that follow" in line]
    assert [line.startswith("BertLMHeadModel lets tokens see those that follow") for line in said] == (
        [] if is_decoder else [True]
    )


def test_a_first_text_without_labels_is_no_obstacle() -> None:
    ids = torch.arange(3, 43).view(2, 20)
    labels = ids.clone()
    labels[0] = -100
    config = {"lora": {"r": 2, "target_modules": ["c_attn"]}}
    start = loraga_dist.initialize(make_model("gpt2"), [{"input_ids": ids, "labels": labels}], config)
    assert start.targets and not start.cautions


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_processor_that_emulates_bfloat16_is_named(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tree_of(tmp_path, save_model(tmp_path / "model"), "CAUSAL_LM", rows=2)
    tree["model"]["dtype"] = dtype
    make_output(tree)
    said = " ".join(capsys.readouterr().err.split())
    slow = dtype == "bfloat16" and not multiplies_bfloat16()
    assert ("warning: this processor has no units for bfloat16" in said) == slow
