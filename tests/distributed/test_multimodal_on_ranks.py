"""Models that read images, too: their language model starts from text, in the class that TRL loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import config_tree, save_data
from datasets import Dataset
from multimodal import as_trl_loads, save_multimodal
from outputs import (
    EXPERTS,
    logits_of,
    make_output,
    make_outputs,
    read_factors,
    read_products,
    read_report,
    relative,
)
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Trainer, TrainingArguments

from loraga_dist.artifacts.verify import verify
from loraga_dist.cli import main
from loraga_dist.files.checksums import write_checksums
from loraga_dist.files.safetensors_io import scan_checkpoint
from loraga_dist.files.stored_tensors import entries_of
from loraga_dist.ranks.world import World

KINDS = ["qwen3_vl", "qwen3_vl_moe", "gemma3", "llava", "llama4", "qwen3_5", "mistral3"]
LANGUAGE_MODELS = {"llama4": "language_model."}
ROWS = 6


@dataclass(frozen=True)
class Outputs:
    base: Path
    alone: Path
    sharded: Path
    data: Path


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outputs]:
    """Of every kind, of one rank that holds the model, and of two that each hold half of it."""
    root = tmp_path_factory.mktemp("multimodal")
    data = save_data(root / "data.jsonl", rows=ROWS)
    found, trees = {}, []
    for kind in KINDS:
        base = save_multimodal(root / kind, kind)
        alone, sharded = (config_tree(base, data, root / f"{kind}-{ranks}", r=2) for ranks in (1, 2))
        if kind == "qwen3_vl_moe":  # each expert's matrix lies transposed in the checkpoint
            alone["lora"]["target_parameters"] = sharded["lora"]["target_parameters"] = EXPERTS
        make_output(alone)
        trees.append(sharded)
        found[kind] = Outputs(base, root / f"{kind}-1", root / f"{kind}-2", data)
    make_outputs(trees, 2)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one(kind: str, outputs: dict[str, Outputs]) -> None:
    alone, sharded = outputs[kind].alone, outputs[kind].sharded
    assert (read_report(alone)["order"], read_report(sharded)["order"]) == ("model", "block")
    expected, found = read_products(alone), read_products(sharded)
    assert found.keys() == expected.keys()
    for name, product in expected.items():
        assert name.startswith(LANGUAGE_MODELS.get(kind, "model.language_model."))
        assert relative(found[name], product) < 1e-4, name


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_models_own_loss(kind: str, outputs: dict[str, Outputs]) -> None:
    model, factors = as_trl_loads(outputs[kind].base).eval(), read_factors(outputs[kind].alone)
    tokenizer = AutoTokenizer.from_pretrained(outputs[kind].base)
    texts = [json.loads(line)["text"] for line in outputs[kind].data.read_text().splitlines()]
    rows = [[*tokenizer(text).input_ids, tokenizer.eos_token_id][:64] for text in texts]
    num_supervised = sum(len(row) - 1 for row in rows)
    for row in rows:
        ids = torch.tensor([row])
        loss = model(input_ids=ids, labels=ids).loss
        (loss * (len(row) - 1) / num_supervised).backward()
    for name, target in read_report(outputs[kind].alone)["targets"].items():
        if stack := target["stack"]:
            G_MN = model.get_parameter(stack["parameter"]).grad[stack["index"]]
        else:
            G_MN = model.get_submodule(name).weight.grad
        U_MK, S_K, Vh_KN = (factors[f"{name}.{part}"] for part in ("U", "S", "Vh"))
        assert relative(U_MK * S_K, G_MN @ Vh_KN.T) < 1e-4, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_residual_base_is_the_checkpoint_by_its_own_keys(kind: str, outputs: dict[str, Outputs]) -> None:
    base, out = outputs[kind].base, outputs[kind].sharded
    before, after = scan_checkpoint(base), scan_checkpoint(out / "residual_base")
    assert entries_of(after) == entries_of(before)
    changed = {key for key in before if not torch.equal(before[key].read(), after[key].read())}
    targets = read_report(out)["targets"]
    assert changed == {target["weight_key"] for target in targets.values()}
    assert not any("vision" in key or "visual" in key for key in changed)
    expected = logits_of(as_trl_loads(base))
    loaded = PeftModel.from_pretrained(as_trl_loads(out / "residual_base"), out / "loraga_init")
    assert (logits_of(loaded) - expected).abs().max() < 1e-5 * expected.abs().max()
    name = type(loaded.get_base_model()).__name__
    shown = (out / "README.md").read_text()
    assert f"from transformers import {'AutoModelForCausalLM' if kind == 'gemma3' else name}\n" in shown


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_converts(kind: str, outputs: dict[str, Outputs], tmp_path: Path) -> None:
    """In TRL; of Llama 4 TRL 1.16 takes the part with the head for one without, so in transformers' own trainer."""
    from trl import SFTConfig, SFTTrainer

    base, out = outputs[kind].base, outputs[kind].sharded
    model = PeftModel.from_pretrained(as_trl_loads(out / "residual_base"), out / "loraga_init", is_trainable=True)
    of_trl = kind != "llama4"
    arguments = (SFTConfig if of_trl else TrainingArguments)(
        output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, use_cpu=True, bf16=False, report_to="none",
        save_strategy="no", per_device_train_batch_size=2,
    )  # fmt: skip
    ids = torch.arange(3, 43).view(2, 20).tolist()
    rows, tokenizer = Dataset.from_dict({"input_ids": ids, "labels": ids}), AutoTokenizer.from_pretrained(base)
    trainer: Any = (SFTTrainer if of_trl else Trainer)(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))

    expected, original = logits_of(model), logits_of(as_trl_loads(base))
    words = ["--init", out / "loraga_init", "--trained", tmp_path / "trained"]
    words += ["--to", tmp_path / "plain", "--merge", tmp_path / "merged"]
    assert main(["convert", *map(str, words)]) == 0
    plain = PeftModel.from_pretrained(as_trl_loads(base), tmp_path / "plain")
    stored, held = load_file(tmp_path / "plain" / "adapter_model.safetensors"), get_peft_model_state_dict(plain)
    assert stored.keys() == held.keys() and all(torch.equal(stored[key], held[key]) for key in stored)
    for found in (logits_of(plain), logits_of(as_trl_loads(tmp_path / "merged"))):
        assert (found - expected).abs().max() < 1e-4 * (expected - original).abs().max()


def test_of_transposed_experts_commands_write_the_checkpoints_layout(
    outputs: dict[str, Outputs], tmp_path: Path
) -> None:
    base, out, again = outputs["qwen3_vl_moe"].base, outputs["qwen3_vl_moe"].sharded, tmp_path / "again"
    assert main(["materialize-base", str(out), "--to", str(again)]) == 0
    written = load_file(out / "residual_base" / "model.safetensors")
    assert all(torch.equal(tensor, written[key]) for key, tensor in load_file(again / "model.safetensors").items())

    scale = ["--lora.r", "1", "--init.scale", "weight_svd"]
    assert main(["rebuild", str(out), "--to", str(tmp_path / "rebuilt"), *scale]) == 0
    rebuilt = tmp_path / "rebuilt"
    loaded = PeftModel.from_pretrained(as_trl_loads(rebuilt / "residual_base"), rebuilt / "loraga_init")
    expected = logits_of(as_trl_loads(base))
    assert (logits_of(loaded) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert verify(rebuilt).problems == []
    path, key = rebuilt / "residual_base" / "model.safetensors", "model.language_model.layers.1.mlp.experts.down_proj"
    tensors = load_file(path)
    tensors[key][3, 0, 1] *= 1.01
    save_file(tensors, path, {"format": "pt"})
    write_checksums(rebuilt, World.alone())
    assert any(key in problem for problem in verify(rebuilt).problems)
