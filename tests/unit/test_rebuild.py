"""Outputs rebuilt from files: the residual base from its adapter, whole outputs from their factors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from builders import config_tree, save_data, save_model
from outputs import read_report
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loraga_dist.artifacts.verify import verify
from loraga_dist.cli import init_main, main
from loraga_dist.config import load_config

R = 4


def init(root: Path, out: Path, *overrides: str, kind: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    base = root / f"base-{kind}-{dtype}"
    if not base.exists():
        save_model(base, kind, dtype=dtype)
    config = root / f"{out.name}.yaml"
    config.write_text(yaml.safe_dump(config_tree(base, save_data(root / "data.jsonl"), out, kind=kind, r=R)))
    assert init_main(["--config", str(config), *overrides]) == 0
    return out


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Outputs by family, dtype and overrides, each made once, when first asked for."""
    root, made = tmp_path_factory.mktemp("rebuild"), {}

    def get(*overrides: str, kind: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        key = (kind, dtype, overrides)
        if key not in made:
            made[key] = init(root, root / f"out-{len(made)}", *overrides, kind=kind, dtype=dtype)
        return made[key]

    return get


@pytest.mark.parametrize(
    "calibration",
    [
        {"data_files": "data.jsonl"},
        {"dataset_name": "json", "data_files": ["data.jsonl"]},
        {"dataset_name": "saved", "data_files": None},
        {"dataset_name": "files", "data_files": "*.jsonl"},
    ],
    ids=["files", "builder", "saved", "directory"],
)
def test_the_resolved_configuration_is_the_run_from_anywhere(
    calibration: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "base")
    data = save_data(tmp_path / "data.jsonl")
    (tmp_path / "files").mkdir()
    shutil.copy(data, tmp_path / "files")
    datasets.load_dataset("json", data_files=str(data), split="train").save_to_disk(tmp_path / "saved")
    sections = {"calibration": calibration, "gradient": {"activations_dir": "kept"}}
    tree = config_tree(Path("base"), Path("data.jsonl"), Path("out"), **sections)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    assert init_main(["--config", "config.yaml"]) == 0
    monkeypatch.chdir("/")
    resolved, again = tmp_path / "out" / "resolved_config.yaml", tmp_path / "again"
    assert load_config(resolved).gradient.activations_dir == str(tmp_path / "kept")
    assert init_main(["--config", str(resolved), "--output.dir", str(again)]) == 0
    assert main(["verify", str(again)]) == 0


def test_paths_may_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "base")
    save_data(tmp_path / "data.jsonl")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_tree(Path("base"), Path("data.jsonl"), Path("out"))))
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {"model.name_or_path": "~/base", "calibration.data_files": "[~/data.jsonl]", "output.dir": "~/at home"}
    words = [word for key, path in paths.items() for word in (f"--{key}", path)]
    assert init_main(["--config", str(tmp_path / "config.yaml"), *words]) == 0
    assert main(["verify", str(tmp_path / "at home")]) == 0


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "loraga_init" / "adapter_model.safetensors")


def line_of(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loraga-dist: ")]
    return line


@pytest.mark.parametrize(
    ("kind", "dtype", "residual_dtype"),
    [
        ("llama", torch.float32, "auto"),
        ("llama", torch.bfloat16, "float32"),
        ("gpt2", torch.bfloat16, "auto"),
    ],
)
def test_a_materialized_base_is_the_one_that_full_writes(
    outputs: Callable[..., Path], kind: str, dtype: torch.dtype, residual_dtype: str, tmp_path: Path
) -> None:
    overrides = ("--output.residual_dtype", residual_dtype)
    full = outputs(*overrides, kind=kind, dtype=dtype)
    none = outputs("--output.residual_base", "none", *overrides, kind=kind, dtype=dtype)
    assert not (none / "residual_base").exists()
    assert main(["materialize-base", str(none), "--to", str(tmp_path / "base")]) == 0
    found = contents(tmp_path / "base")
    assert found.pop("SHA256SUMS") and found == contents(full / "residual_base")


def test_a_materialized_base_becomes_part_of_its_output(outputs: Callable[..., Path], tmp_path: Path) -> None:
    out = shutil.copytree(outputs("--output.residual_base", "none"), tmp_path / "out")
    assert not verify(out).residual_checked
    assert main(["materialize-base", str(out)]) == 0
    assert verify(out).ok and verify(out).residual_checked
    weights = next((out / "residual_base").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert not verify(out).ok


def test_materializing_is_refused_where_it_would_do_harm(
    outputs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none, full = outputs("--output.residual_base", "none"), outputs()
    other = save_model(tmp_path / "other", seed=1)
    for arguments, code, said in (
        ((full,), 2, "exists"),
        ((tmp_path,), 2, "is this the directory of a finished run"),
        ((none, "--to", tmp_path / "x", "--base", other), 2, "is not the base of loraga_init"),
        ((none, "--to", tmp_path / "x", "--base", tmp_path), 2, "holds neither"),
    ):
        assert main(["materialize-base", *(str(word) for word in arguments)]) == code
        assert said in line_of(capsys)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


@pytest.mark.parametrize(
    ("kind", "dtype", "overrides"),
    [
        ("llama", torch.float32, ()),
        ("llama", torch.bfloat16, ("--gradient.engine", "sketch")),
        ("gpt2", torch.float32, ("--init.scale", "weight_svd", "--init.direction", "random")),
        ("llama", torch.float32, ("--lora.use_rslora", "true", "--lora.rank_pattern", "{q_proj: 3}")),
        ("llama", torch.float32, ("--lora.target_modules", "[q_proj]", "--lora.modules_to_save", "[lm_head]")),
    ],
)
def test_the_same_settings_give_the_same_files(
    outputs: Callable[..., Path], kind: str, dtype: torch.dtype, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    source = outputs(*overrides, kind=kind, dtype=dtype)
    assert main(["rebuild", str(source), "--to", str(tmp_path / "again")]) == 0
    before, after = contents(source), contents(tmp_path / "again")
    assert before.keys() == after.keys()
    for name in before:
        if name.endswith(".safetensors") or name.startswith("residual_base/"):
            assert after[name] == before[name], name
    old, new = read_report(source), read_report(tmp_path / "again")
    for name, target in old["targets"].items():
        assert new["targets"][name]["offset_ratio"] == pytest.approx(target["offset_ratio"], rel=1e-5)
        target["offset_ratio"] = new["targets"][name]["offset_ratio"]
        assert new["targets"][name] == target
    assert new["warnings"] == old["warnings"]
    assert new["rebuilt"]["source"] == str(source.resolve()) and "rebuilt" not in old


def test_rebuilding_asks_for_nothing_that_the_run_alone_needed(outputs: Callable[..., Path], tmp_path: Path) -> None:
    source = shutil.copytree(outputs(), tmp_path / "out")
    for name, key, no_key in (
        ("resolved_config.yaml", "  dtype: auto", "deepspeed: null"),
        ("loraga_report.json", '"dtype": "auto"', '"deepspeed": null'),
    ):
        text = (source / name).read_text()
        assert text.count(key) == text.count(no_key) == 1
        text = text.replace(key, key.replace("auto", "float16"))  # which runs on GPUs alone
        (source / name).write_text(text.replace(no_key, no_key.replace("null", '"/moved/zero3.json"')))
    assert main(["rebuild", str(source), "--to", str(tmp_path / "new")]) == 0
    assert adapter(tmp_path / "new").keys() == adapter(source).keys()
    new = load_config(tmp_path / "new" / "resolved_config.yaml")
    assert (new.model.dtype, new.deepspeed) == ("float16", "/moved/zero3.json")


def test_other_settings_are_those_of_a_fresh_run(outputs: Callable[..., Path], tmp_path: Path) -> None:
    settings = ("--lora.r", "3", "--lora.use_rslora", "true", "--init.scale", "unit", "--init.direction", "A2rBr")
    fresh = outputs(*settings)
    assert main(["rebuild", str(outputs()), "--to", str(tmp_path / "new"), *settings]) == 0
    assert verify(tmp_path / "new").ok
    found, expected = adapter(tmp_path / "new"), adapter(fresh)
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-4)
    for name, target in read_report(fresh)["targets"].items():
        assert read_report(tmp_path / "new")["targets"][name]["captured_energy"] == pytest.approx(
            target["captured_energy"], abs=1e-5
        )
    assert read_report(tmp_path / "new")["warnings"] == read_report(fresh)["warnings"]


def test_stock_peft_starts_at_the_original_from_a_larger_rank(outputs: Callable[..., Path], tmp_path: Path) -> None:
    source, new = outputs(), tmp_path / "new"
    assert main(["rebuild", str(source), "--to", str(new), "--lora.r", "6", "--lora.lora_alpha", "12"]) == 0
    assert "less accurate" in "".join(read_report(new)["warnings"])
    base = read_report(source)["config"]["model"]["name_or_path"]
    tokens = torch.arange(40).view(2, 20)
    residual = AutoModelForCausalLM.from_pretrained(new / "residual_base")
    model = PeftModel.from_pretrained(residual, new / "loraga_init").eval()
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(base).eval()(tokens).logits
        assert (model(tokens).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert model.peft_config["default"].r == 6


def test_what_the_factors_do_not_hold_is_refused(
    outputs: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = outputs()
    held = min(len(load) for load in factor_widths(source).values())
    for arguments, said in (
        (("--lora.r", held), f"write {held // 2} or less"),
        (("--lora.rank_pattern", "{q_proj: 40}"), "lora.rank_pattern: 40"),
        (("--lora.rank_pattern", "{nothing: 2}"), "matches no target"),
        (("--lora.rank_pattern", "{'q_proj(': 2}"), "lora.rank_pattern: 'q_proj(': is no regular expression"),
        (("--lora.alpha_pattern", "{'*': 2}"), "lora.alpha_pattern: '*': is no regular expression"),
        (("--lora.target_modules", "[q_proj]"), "lora.target_modules: ['q_proj']: is settled by the gradients"),
        (("--output.dir", "x"), "is what --to names; leave it out"),
        (("--calibration.max_samples", 7), "calibration.max_samples: 7: is settled by the gradients"),
        (("--output.push_to_hub", "me/it"), "output.push_to_hub: 'me/it': is for loraga-dist init alone"),
        (("--init.scael", "unit"), "did you mean init.scale?"),
        (("--init.scale", "none"), "init.scale"),
    ):
        words = [str(word) for word in arguments]
        assert main(["rebuild", str(source), "--to", str(tmp_path / "new"), *words]) == 2, arguments
        assert said in line_of(capsys)
    assert main(["rebuild", str(source), "--to", str(source), "--overwrite"]) == 2
    assert "which is read" in line_of(capsys)
    assert verify(source).ok and not list(tmp_path.iterdir())


def factor_widths(directory: Path) -> dict[str, torch.Tensor]:
    stored = [load_file(path) for path in (directory / "factors").glob("*.safetensors")]
    return {key: tensor for part in stored for key, tensor in part.items() if key.endswith(".S")}
