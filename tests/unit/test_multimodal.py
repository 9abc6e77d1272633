"""Models that read images, too: where their weights lie, what all-linear takes of them, and what it leaves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import config_tree, save_data
from multimodal import KINDS, as_trl_loads, make_multimodal, save_multimodal
from outputs import logits_of, make_output, read_report, write_config
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

from loraga_dist.cli import main
from loraga_dist.config import LoraSection, ModelConfig
from loraga_dist.errors import UserError
from loraga_dist.files.safetensors_io import scan_checkpoint
from loraga_dist.files.stored_tensors import StoredTensor
from loraga_dist.model.base import find_base_model
from loraga_dist.model.blocks import find_blocks
from loraga_dist.model.conversion import StoredModel
from loraga_dist.model.selection import Selection, select_targets
from loraga_dist.model.targets import meta_copy
from loraga_dist.request.refusals import require_gradients_of_text


def lies(directory: Path) -> StoredModel:
    base = find_base_model(ModelConfig(name_or_path=str(directory)), "CAUSAL_LM", torch.device("cpu"))
    return base.stored(meta_copy(base.model_class, base.config))


def chosen(kind: str, **lora: Any) -> Selection:
    model = make_multimodal(kind)
    return select_targets(meta_copy(type(model), model.config), LoraSection(r=1, **lora), lambda r: r)


def require_all_of(stored: StoredModel, model: nn.Module) -> None:
    """Whole, and from some element in the middle to some other."""
    assert stored.as_it_is is not None
    for name, tensor in model.named_parameters():
        place: StoredTensor = stored.tensors[name]
        for first, past in ((0, place.numel), (place.numel // 3, place.numel * 5 // 6)):
            elements = torch.empty(past - first)
            place.read_into(first, elements)
            assert torch.equal(elements, tensor.flatten()[first:past]), name
        assert place.shape == tensor.shape


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_found_under_the_checkpoints_own_key(kind: str, tmp_path: Path) -> None:
    stored = lies(save_multimodal(tmp_path, kind))
    model = as_trl_loads(tmp_path)
    require_all_of(stored, model)
    assert {slot.name for tensor in stored.tensors.values() for slot in tensor.slots} == scan_checkpoint(
        tmp_path
    ).keys()
    blocks = find_blocks(model)
    assert blocks is not None and blocks.count == model.config.get_text_config().num_hidden_layers
    assert re.search("language_model|text_model", blocks.prefix)


@pytest.mark.parametrize(("kind", "old"), [("llava", r"language_model\.model\."), ("qwen2_5_vl", r"model\.layers\.")])
def test_keys_are_those_of_older_versions_or_of_the_model_in_memory(kind: str, old: str, tmp_path: Path) -> None:
    stored = lies(save_multimodal(tmp_path, kind))
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    assert re.match(old, stored.key_of(name))
    model = as_trl_loads(tmp_path)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors", {"format": "pt"})
    stored = lies(tmp_path)
    require_all_of(stored, model)
    assert stored.key_of(name) == name


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_is_the_language_model_and_the_line_adds_the_towers(kind: str) -> None:
    found = chosen(kind)
    (left,) = (part for part in found.left_out if part.kind not in ("experts", "routers"))
    names = {target.name for target in found.targets}
    assert names and not any(name.startswith(tuple(left.names)) for name in names)
    told = re.search(r"lora\.target_modules: (.*) adds them$", left.text)
    assert told is not None
    added = {target.name for target in chosen(kind, target_modules=told[1]).targets} - names
    model = make_multimodal(kind)
    assert added == {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in names and not name.endswith(("lm_head", "router"))
    }
    assert all(f"{name}.".startswith(tuple(f"{tower}." for tower in left.names)) for name in added)


def test_names_that_towers_have_too_are_refused_with_the_line_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, data = save_multimodal(tmp_path / "base", "llava"), save_data(tmp_path / "data.jsonl", rows=4)
    tree = config_tree(base, data, tmp_path / "out", r=2, lora={"target_modules": ["q_proj"]})
    tree["lora"]["exclude_modules"] = ["layers.1.self_attn.q_proj"]
    assert main(["init", "--config", str(write_config(tree))]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "takes in matrices of model.vision_tower, which text gives no gradient" in line
    told = line.rpartition("write lora.exclude_modules: ")[2]
    assert told == r"(.*\.)?layers\.1\.self_attn\.q_proj|model\.vision_tower(\..*)?"
    tree["lora"]["exclude_modules"] = told
    assert list(read_report(make_output(tree))["targets"]) == ["model.language_model.layers.0.self_attn.q_proj"]
    tree["lora"]["exclude_modules"], tree["init"] = None, {"scheme": "pissa"}
    tree["output"]["dir"] += "-pissa"
    assert len(read_report(make_output(tree))["targets"]) == 3


def test_parameters_of_towers_are_left_out_where_they_are_named() -> None:
    lora = {"target_modules": r".*language_model.*q_proj", "target_parameters": ["visual.merger.linear_fc1.weight"]}

    def require(**changes: Any) -> None:
        section = lora | changes
        require_gradients_of_text(
            LoraSection(**section), chosen("qwen3_vl_moe", **section).targets, "model.language_model"
        )

    told = "leave visual.merger.linear_fc1.weight out of lora.target_parameters"
    with pytest.raises(UserError, match=rf"^lora.target_parameters: .* model\.visual, .*; {told}$"):
        require()
    with pytest.raises(
        UserError, match=rf"^lora.target_modules: .*; {told}; write lora.exclude_modules: model\\\.visual"
    ):
        require(target_modules=r".*(q_proj|visual.*linear_fc2)")
    require(target_parameters=None)


def test_layers_that_only_images_reach_are_refused_with_the_line_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, data = save_multimodal(tmp_path / "base", "mllama"), save_data(tmp_path / "data.jsonl", rows=4)
    tree = config_tree(base, data, tmp_path / "out", r=2)
    assert main(["init", "--config", str(write_config(tree))]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "took no part in the loss" in line
    tree["lora"]["exclude_modules"] = line.rpartition("write lora.exclude_modules: ")[2]
    assert {name.split(".")[3] for name in read_report(make_output(tree))["targets"]} == {"0", "2"}


@pytest.mark.parametrize(("kind", "class_name"), [("llama4", "Llama4ForCausalLM"), ("qwen3_5", "Qwen3_5ForCausalLM")])
def test_the_language_model_alone_where_the_user_wants_that(kind: str, class_name: str, tmp_path: Path) -> None:
    base, data = save_multimodal(tmp_path / "base", kind), save_data(tmp_path / "data.jsonl", rows=4)
    tree = config_tree(base, data, tmp_path / "out", r=2)
    tree["model"]["class"] = class_name
    out = make_output(tree)
    assert read_report(out)["config"]["model"]["class"] == class_name
    assert f"from transformers import {class_name}\n" in (out / "README.md").read_text()
    assert scan_checkpoint(out / "residual_base").keys() == scan_checkpoint(base).keys()
    model_class = getattr(transformers, class_name)
    started = PeftModel.from_pretrained(model_class.from_pretrained(out / "residual_base"), out / "loraga_init")
    expected = logits_of(as_trl_loads(base))
    assert (logits_of(started) - expected).abs().max() < 1e-5 * expected.abs().max()
