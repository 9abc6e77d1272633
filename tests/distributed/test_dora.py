"""`lora.use_dora`: magnitudes of the original weights, so that stock PEFT's DoRA starts at the original model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import config_tree, save_data, save_model
from launching import INIT, run_ranks, succeed
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import loraga_dist
from loraga_dist.artifacts.verify import verify
from loraga_dist.cli import init_main, main

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Outputs by family, number of ranks and scheme, each made once, when first asked for."""
    root = tmp_path_factory.mktemp("dora")
    data = save_data(root / "data.jsonl")

    def get(
        kind: str = "llama", world_size: int = 1, scheme: str = "lora_ga", dtype: torch.dtype | None = None
    ) -> Path:
        base, out = root / f"{kind}-{dtype}", root / f"out-{kind}-{world_size}-{scheme}-{dtype}"
        if not base.exists():
            save_model(base, kind, dtype=dtype or torch.float32)
        if not out.exists():
            config = out.with_suffix(".yaml")
            tree = config_tree(base, data, out, kind=kind, lora={"use_dora": True}, init={"scheme": scheme})
            config.write_text(yaml.safe_dump(tree))
            if world_size == 1:
                assert init_main(["--config", str(config)]) == 0
            else:
                succeed(run_ranks([INIT, "--config", str(config)], world_size))
        return out

    return get


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "loraga_report.json").read_text())


def original(out: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(report(out)["config"]["model"]["name_or_path"])


def started(out: Path, **changes: Any) -> Any:
    base = out / "residual_base" if (out / "residual_base").exists() else original(out).name_or_path
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "loraga_init", **changes)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 43).view(2, 20)).logits.float()


def line_of(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loraga-dist: ")]
    return line


CASES = [("llama", 1, None), ("llama", 2, None), ("gpt2", 1, None), ("llama", 1, torch.bfloat16)]


@pytest.mark.parametrize(("kind", "world_size", "dtype"), CASES)
def test_stock_dora_starts_at_the_original(
    runs: Callable[..., Path], kind: str, world_size: int, dtype: torch.dtype | None
) -> None:
    out = runs(kind, world_size, dtype=dtype)
    assert verify(out).problems == [] and verify(out).residual_checked
    base, model = original(out), started(out)
    expected, bar = logits(base), 1e-5 if dtype is None else 3e-2
    assert (logits(model) - expected).abs().max() < bar * expected.abs().max()

    stored = load_file(out / "loraga_init" / WEIGHTS)
    for name, target in report(out)["targets"].items():
        W = base.get_submodule(name).weight.double()
        norms_M = torch.linalg.vector_norm(W.t() if target["transposed"] else W, dim=1)
        found_M = stored[f"base_model.model.{name}.lora_magnitude_vector"]
        assert found_M.dtype == torch.float32
        torch.testing.assert_close(found_M.double(), norms_M, rtol=1e-7, atol=0)
        layer = model.base_model.model.get_submodule(name)
        assert torch.equal(layer.lora_magnitude_vector["default"].weight.float(), found_M), name
        with torch.no_grad():  # what PEFT would take by itself
            W_res = layer.get_base_layer().weight
            norms = torch.linalg.vector_norm(W_res.t() if target["transposed"] else W_res, dim=1)
            layer.lora_magnitude_vector["default"].weight.copy_(norms)
    assert (logits(model) - expected).abs().max() > 10 * bar * expected.abs().max()


def test_ranks_do_not_matter(runs: Callable[..., Path]) -> None:
    found, expected = (load_file(runs("llama", size) / "loraga_init" / WEIGHTS) for size in (2, 1))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key] - tensor).norm() <= (0 if "magnitude" in key else 1e-4) * tensor.norm(), key


def test_the_offset_is_plain_and_gives_the_residual(runs: Callable[..., Path]) -> None:
    out = runs()
    assert not json.loads((out / "loraga_offset/adapter_config.json").read_text())["use_dora"]
    assert not any("magnitude" in key for key in load_file(out / "loraga_offset" / WEIGHTS))
    merged: Any = PeftModel.from_pretrained(original(out), out / "loraga_offset")
    residual = AutoModelForCausalLM.from_pretrained(out / "residual_base").state_dict()
    for key, tensor in merged.merge_and_unload().state_dict().items():
        torch.testing.assert_close(tensor, residual[key], rtol=1e-6, atol=1e-6)


def test_an_unchanged_base_starts_where_the_scheme_does(runs: Callable[..., Path], tmp_path: Path) -> None:
    out = runs(scheme="lora_one")
    assert verify(out).problems == []
    assert main(["rebuild", str(out), "--to", str(tmp_path / "plain"), "--lora.use_dora", "false"]) == 0
    expected, base = logits(started(tmp_path / "plain")), logits(original(out))
    assert (logits(started(out)) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (expected - base).abs().max() > 1e-3 * base.abs().max()


def test_refactoring_makes_dora_of_plain_and_back(runs: Callable[..., Path], tmp_path: Path) -> None:
    out, plain, dora = runs(), tmp_path / "plain", tmp_path / "dora"
    assert main(["rebuild", str(out), "--to", str(plain), "--lora.use_dora", "false"]) == 0
    assert not any("magnitude" in key for key in load_file(plain / "loraga_init" / WEIGHTS))
    assert main(["rebuild", str(plain), "--to", str(dora), "--lora.use_dora", "true"]) == 0
    assert (dora / "loraga_init" / WEIGHTS).read_bytes() == (out / "loraga_init" / WEIGHTS).read_bytes()
    assert verify(plain).ok and verify(dora).ok


@pytest.mark.parametrize("scheme", ["lora_ga", "lora_one"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_trained_dora_merges(
    runs: Callable[..., Path], kind: str, scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, trained = runs(kind, scheme=scheme), tmp_path / "trained"
    model = started(out, is_trainable=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter += (0.2 if "magnitude" in name else 0.02) * noise
    model.save_pretrained(trained)
    words = ["convert", "--init", str(out / "loraga_init"), "--trained", str(trained)]
    assert main([*words, "--to", str(tmp_path / "to")]) == 2
    assert "cannot hold a trained DoRA" in (line := line_of(capsys)) and "write --merge DIR instead" in line
    assert main([*words, "--merge", str(tmp_path / "merged")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "trained"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = logits(model)
    assert (logits(merged) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (expected - logits(original(out))).abs().max() > 1e-2 * expected.abs().max()
    by_peft, base = model.merge_and_unload().state_dict(), original(out).state_dict()
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, by_peft[key], rtol=1e-5, atol=1e-6)
    changed = {key for key, tensor in merged.state_dict().items() if not torch.equal(tensor, base[key])}
    assert changed == {f"{name}.weight" for name in report(out)["targets"]}


def test_a_plain_state_dict_merges_and_broken_magnitudes_do_not(
    runs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = runs()
    trained = shutil.copytree(out / "loraga_init", tmp_path / "trained")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    tensors = load_file(trained / WEIGHTS)
    tensors[key] *= 1.5
    words = ["convert", "--init", str(out / "loraga_init"), "--trained", str(trained), "--merge"]
    save_file({k.replace("vector", "vector.default.weight"): t for k, t in tensors.items()}, trained / WEIGHTS)
    assert main([*words, str(tmp_path / "merged")]) == 0
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    base = original(out).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(found[name], 1.5 * base[name], rtol=1e-5, atol=1e-6)

    capsys.readouterr()
    for broken, said in (
        (torch.full_like(tensors[key], torch.nan), "not finite"),
        (tensors[key][:5], "has shape (5,)"),
    ):
        save_file(tensors | {key: broken.clone()}, trained / WEIGHTS)
        assert main([*words, str(tmp_path / "broken")]) == 2
        assert key in (line := line_of(capsys)) and said in line
    config = json.loads((trained / "adapter_config.json").read_text()) | {"use_dora": False}
    (trained / "adapter_config.json").write_text(json.dumps(config))
    assert main([*words, str(tmp_path / "broken")]) == 2
    assert "has use_dora False" in line_of(capsys)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda tensors, key: tensors[key].mul_(1 + 1e-6), "lora_magnitude_vector is off by"),
        (lambda tensors, key: tensors[key].fill_(torch.nan), "lora_magnitude_vector is off by nan"),
        (lambda tensors, key: tensors.pop(key), "lora_magnitude_vector has shape None"),
    ],
)
def test_verify_holds_magnitudes_against_the_base(
    runs: Callable[..., Path], damage: Callable[[dict, str], object], said: str, tmp_path: Path
) -> None:
    out = shutil.copytree(runs(), tmp_path / "out")
    path = out / "loraga_init" / WEIGHTS
    tensors = load_file(path)
    damage(tensors, "base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector")
    save_file(tensors, path, {"format": "pt"})
    assert any(said in problem and "layers.1.mlp.up_proj" in problem for problem in verify(out).problems)


def test_an_output_without_weights_is_refused(
    runs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_model(tmp_path / "base", shards=False)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3] = 0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = runs().with_suffix(".yaml")
    words = ["--config", str(config), "--model.name_or_path", str(base), "--output.dir", str(tmp_path / "out")]
    assert init_main(words) == 2
    line = line_of(capsys)
    assert "lora.use_dora: True: model.layers.1.mlp.down_proj.weight has an output whose weights are zero" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", ["lora_ga", "kaiming", "lora_one"])
def test_a_model_in_memory_starts_with_them(scheme: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "base"))
    norms = {name: module.weight.norm(dim=1) for name, module in model.named_modules() if "proj" in name}
    before = logits(model)
    ids = torch.arange(60).view(2, 30)
    lora = {"r": 4, "lora_alpha": 8, "use_dora": True}
    start = loraga_dist.initialize(
        model, [{"input_ids": ids, "labels": ids}], {"lora": lora, "init": {"scheme": scheme}}
    )
    with pytest.raises(loraga_dist.LoragaError, match="lora.use_dora: True: its magnitudes are not saved"):
        loraga_dist.save_start(start, tmp_path / "saved")
    check = start.identity_check
    differs = (logits(start.model) - before).abs().max()
    if scheme != "lora_one":
        assert differs < 1e-5 * before.abs().max()
        assert check.max_abs_logit_diff < 1e-5 * check.max_abs_logit
    else:
        assert differs > 1e-3 * before.abs().max()
    checked = 0
    for name, norms_M in norms.items():
        layer = start.model.base_model.model.get_submodule(name)
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert magnitude.requires_grad
        if scheme == "lora_one":
            W = layer.get_base_layer().weight + layer.get_delta_weight("default")
            norms_M = W.norm(dim=1)
        torch.testing.assert_close(magnitude.detach(), norms_M.detach(), rtol=1e-6, atol=0)
        checked += 1
    assert checked == 21
