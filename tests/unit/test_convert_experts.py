"""Trained experts by their names in the checkpoint, against the merged model and PEFT's layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import MOE, config_tree, conversion, save_data, save_model
from outputs import make_output, read_adapter
from safetensors.torch import load_file, save_file

from loraga_dist.cli import main
from loraga_dist.commands.convert import how_to_serve

NAMES = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w1",
    "qwen2_moe": "model.layers.1.mlp.experts.3.gate_proj",
    "qwen3_moe": "model.layers.1.mlp.experts.3.gate_proj",
    "deepseek_v3": "model.layers.1.mlp.experts.3.gate_proj",
}
"""A module that the family's checkpoints have, and what `FusedMoE` of vLLM and SGLang look for."""


def moved(out: Path, trained: Path) -> Path:
    """The start, as training might leave it."""
    trained.mkdir()
    (trained / "adapter_config.json").write_text((out / "loraga_init" / "adapter_config.json").read_text())
    torch.manual_seed(1)
    tensors = {key: value + 0.05 * torch.randn_like(value) for key, value in read_adapter(out).items()}
    save_file(tensors, trained / "adapter_model.safetensors")
    return trained


def start(root: Path, kind: str) -> tuple[Path, Path, list[str]]:
    """Base, and what `convert` takes; every dense target beside the experts, routers of some."""
    base, data = save_model(root / "base", kind), save_data(root / "data.jsonl", rows=8)
    router = ["mlp.gate.weight"] if kind in ("mixtral", "deepseek_v3") else []
    experts = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj", *router]}
    out = make_output(config_tree(base, data, root / "out", kind=kind, r=2, lora=experts))
    return base, out, ["--init", str(out / "loraga_init"), "--trained", str(moved(out, root / "trained"))]


def tensors_of(model: Path) -> dict[str, torch.Tensor]:
    return {key: tensor.double() for path in model.glob("*.safetensors") for key, tensor in load_file(path).items()}


@pytest.mark.parametrize("kind", NAMES)
def test_each_is_the_update_of_its_tensor(kind: str, tmp_path: Path) -> None:
    base, _, inputs = start(tmp_path, kind)
    to, merged = tmp_path / "to", tmp_path / "merged"
    assert main(["convert", *inputs, "--to", str(to), "--merge", str(merged), "--per_expert"]) == 0
    before, after, adapter = tensors_of(base), tensors_of(merged), read_adapter(tmp_path, "to")
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in adapter}
    assert NAMES[kind] in names
    for name in names:
        A_RN, B_MR = (adapter[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
        update = after[f"{name}.weight"] - before[f"{name}.weight"]
        assert (B_MR @ A_RN - update).norm() < 1e-5 * update.norm(), name
    changed = {key.removesuffix(".weight") for key in before if not torch.equal(before[key], after[key])}
    assert names == changed
    config = json.loads((to / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == names and config["target_parameters"] is None
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 4, {})


def test_a_truncated_one_keeps_what_pefts_layout_keeps(tmp_path: Path) -> None:
    _, out, inputs = start(tmp_path, "mixtral")
    assert "vLLM and SGLang want `--per_expert`" in (out / "README.md").read_text()
    for to, more in (("stacked", []), ("apart", ["--per_expert"])):
        assert main(["convert", *inputs, "--to", str(tmp_path / to), "--rank", "3", *more]) == 0
    stacked, apart = read_adapter(tmp_path, "stacked"), read_adapter(tmp_path, "apart")
    layer = "base_model.model.model.layers.0"
    E, r = MOE["mixtral"]["num_local_experts"], 3
    A_ERN = stacked[f"{layer}.mlp.experts.base_layer.lora_A.weight"].unflatten(0, (E, r))
    B_MRE = stacked[f"{layer}.mlp.experts.base_layer.lora_B.weight"].unflatten(1, (r, E))
    for expert in range(E):
        names = [f"{layer}.block_sparse_moe.experts.{expert}.{part}" for part in ("w1", "w3")]
        found = [apart[f"{name}.lora_B.weight"] @ apart[f"{name}.lora_A.weight"] for name in names]
        assert (torch.cat(found) - B_MRE[..., expert] @ A_ERN[expert]).abs().max() < 1e-5


def test_experts_in_one_tensor_have_no_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, inputs = start(tmp_path, "gpt_oss")
    readme = (out / "README.md").read_text()
    assert "set_z3_leaf_modules" in readme and "per_expert" not in readme
    assert main(["convert", *inputs, "--to", str(tmp_path / "to"), "--per_expert"]) == 2
    assert "--per_expert: True: names experts as the checkpoint does, but" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def test_what_is_said_of_servers() -> None:
    vllm, other = how_to_serve(Path("a"), conversion(r=8, has_stacks=True))
    assert vllm.startswith("vllm serve") and other.endswith("vLLM and SGLang want --per_expert")
    assert [line.split()[0] for line in how_to_serve(Path("a"), conversion(r=8))] == ["vllm", "python"]
