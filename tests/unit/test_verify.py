"""`verify` accepts what is whole, and sees whatever is not."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from handmade import edit, save_llama, write_output, write_report
from outputs import read_report
from safetensors.torch import load_file, save_file

from loraga_dist.artifacts.verify import VerifyResult, verify
from loraga_dist.commands.rebuild import rebuild
from loraga_dist.errors import UserError
from loraga_dist.files.checksums import check_checksums, write_checksums
from loraga_dist.model.base import read_checkpoint_index
from loraga_dist.ranks.world import World


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "output"))


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
def test_sha256sum_accepts_the_checksums(output: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=output, capture_output=True, timeout=60).returncode == 0
    (output / "README.md").write_text("other")
    assert subprocess.run(command, cwd=output, capture_output=True, timeout=60).returncode == 1


def test_checksums_see_changed_missing_and_added_files(output: Path) -> None:
    (output / "README.md").write_text("other")
    (output / "factors" / "factors-0.safetensors").unlink()
    (output / "residual_base" / "adapter_config.json").write_text("{}")
    (output / "notes.txt").write_text("mine")
    assert sorted(check_checksums(output, World.alone())) == [
        "README.md: does not match SHA256SUMS",
        "factors/factors-0.safetensors: is missing",
        "residual_base/adapter_config.json: is not listed in SHA256SUMS",
    ]


def test_verify_wants_every_file_listed(output: Path) -> None:
    first, *rest = (output / "SHA256SUMS").read_text().splitlines(keepends=True)
    (output / "SHA256SUMS").write_text(first)
    names = [line.rstrip("\n").split("  ")[1] for line in rest]
    assert len(names) > 12
    assert sorted(verify(output).problems) == [f"{name}: is not listed in SHA256SUMS" for name in sorted(names)]


def test_verify_accepts_a_finished_directory(llama: Path, output: Path) -> None:
    num_bytes: list[int] = []
    result = verify(output, on_progress=num_bytes.append)
    assert result == VerifyResult([], 6, result.max_rounding_units) and result.ok
    assert 0.5 < result.max_rounding_units <= 1
    listed = sum(path.stat().st_size for path in output.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    assert sum(num_bytes) == listed + sum(slot.num_bytes for slot in read_checkpoint_index(llama).values())


def test_verify_with_the_base_elsewhere(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    write_output(base, tmp_path / "out")
    moved = base.rename(tmp_path / "moved")
    result = verify(tmp_path / "out")
    assert not result.residual_checked and [str(base) in problem for problem in result.problems] == [True]
    assert verify(tmp_path / "out", base=moved).ok


def test_verify_without_residual_base(llama: Path, tmp_path: Path) -> None:
    write_output(llama, tmp_path / "out", residual_base="none")
    assert verify(tmp_path / "out") == VerifyResult([], 6)
    other = save_llama(tmp_path / "other", seed=1)
    assert "is not the base" in only(verify(tmp_path / "out", base=other))


def only(result: VerifyResult) -> str:
    assert len(result.problems) == 1, result.problems
    return result.problems[0]


def test_verify_names_another_base(output: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", seed=1)
    result = verify(output, base=other)
    assert only(result).startswith(f"base: {other} is not the base") and not result.residual_checked
    bfloat16 = save_llama(tmp_path / "bfloat16", torch.bfloat16)
    assert f"by the base {bfloat16} and the report it is BF16" in only(verify(output, base=bfloat16))


def test_verify_sees_one_flipped_byte_in_any_file(output: Path) -> None:
    dice = random.Random(0)
    paths = sorted(path for path in output.rglob("*") if path.is_file())
    assert len(paths) > 15
    for path in paths:
        content = path.read_bytes()
        position = dice.randrange(len(content))
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert verify(output).problems, (path, position)
        path.write_bytes(content)
    assert verify(output).ok


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_verify_never_raises_for_a_damaged_file_with_fitting_checksums(output: Path) -> None:
    dice = random.Random(0)
    for name in (
        "loraga_report.json",
        "loraga_init/adapter_config.json",
        "loraga_init/adapter_model.safetensors",
        "factors/factors.safetensors.index.json",
        "factors/factors-0.safetensors",
        "residual_base/model.safetensors.index.json",
    ):
        content = (output / name).read_bytes()
        for _ in range(10):
            position = dice.randrange(min(len(content), 2000))
            damaged = bytes([content[position] ^ 1 << dice.randrange(8)])
            (output / name).write_bytes(content[:position] + damaged + content[position + 1 :])
            write_checksums(output, World.alone())
            verify(output)
        (output / name).write_bytes(content)


def test_verify_sees_every_missing_file(output: Path) -> None:
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.unlink()
        assert any(path.name in problem for problem in verify(output).problems), path
        path.write_bytes(content)


def two_neighbours_up(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    for _ in range(2):
        tensor[3, 5] = torch.nextafter(tensor[3, 5], torch.tensor(torch.inf, dtype=tensor.dtype))
    return tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_verify_sees_one_entry_that_is_off(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save_llama(tmp_path / "base", dtype)
    out = tmp_path / "out"
    write_output(base, out)
    key = "model.layers.1.mlp.down_proj.weight"
    edit(out, "residual_base", key, two_neighbours_up)
    problems = verify(out).problems
    assert any(key in problem and "roundings away" in problem for problem in problems)
    assert any("residual_fingerprint" in problem for problem in problems)


def test_verify_sees_a_changed_tensor_that_is_no_target(output: Path) -> None:
    edit(output, "residual_base", "model.norm.weight", lambda tensor: -tensor)
    assert any("model.norm.weight is no target, but differs" in problem for problem in verify(output).problems)


def adapter_key(name: str, side: str) -> str:
    return f"base_model.model.model.layers.{name}.lora_{side}.weight"


def test_verify_sees_factors_of_another_target(output: Path) -> None:
    for part in ("loraga_init", "loraga_offset"):
        path = output / part / "adapter_model.safetensors"
        held = load_file(path)
        for side in "AB":
            first, second = (adapter_key(f"{layer}.mlp.down_proj", side) for layer in range(2))
            held[first], held[second] = held[second], held[first]
        save_file(held, path, {"format": "pt"})
    write_checksums(output, World.alone())
    problems = verify(output).problems
    assert sum("down_proj.weight is" in problem and "roundings away" in problem for problem in problems) == 2
    assert sum("down_proj.lora_" in problem and "is not made of factors" in problem for problem in problems) == 4
    assert len(problems) == 7 and "loraga_init: its fingerprint is not the report's adapter_fingerprint" in problems


def test_verify_sees_offset_that_is_not_minus_the_init(output: Path) -> None:
    edit(output, "loraga_offset", adapter_key("0.mlp.down_proj", "B"), lambda tensor: -tensor)
    assert "loraga_offset" in only(verify(output)) and "lora_B" in only(verify(output))


def test_verify_sees_another_scaling(output: Path) -> None:
    for part in ("loraga_init", "loraga_offset"):
        path = output / part / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": False}))
    write_checksums(output, World.alone())
    problems = verify(output).problems
    assert sum("has use_rslora 'False', and by loraga_report.json it is True" in problem for problem in problems) == 2
    assert sum("scales model.layers.0.self_attn.q_proj by 4.0, loraga_report.json says" in it for it in problems) == 1
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "pissa"}))
    write_checksums(output, World.alone())
    assert any("adapter_config.json has init_lora_weights 'pissa'" in problem for problem in verify(output).problems)


def test_verify_sees_another_rank_in_the_report(output: Path) -> None:
    report = read_report(output)
    report["targets"]["model.layers.1.mlp.down_proj"]["r"] = 3
    write_report(output, report)
    write_checksums(output, World.alone())
    assert "gives model.layers.1.mlp.down_proj rank 4, loraga_report.json says 3" in verify(output).problems[0]


def test_verify_sees_values_that_are_not_finite(output: Path) -> None:
    edit(output, "loraga_init", adapter_key("0.mlp.down_proj", "A"), lambda tensor: tensor * torch.nan)
    problems = verify(output).problems
    assert any("not finite" in problem for problem in problems)
    assert any("inf roundings" in problem for problem in problems)


@pytest.mark.parametrize(
    ("part", "change", "problem"),
    [
        ("U", lambda U: U * 1.001, "not orthonormal"),
        ("Vh", lambda Vh: Vh * torch.nan, "not orthonormal"),
        ("S", lambda S: S.flip(0), "descending"),
        ("S", lambda S: S[:-1], "is not U"),
    ],
)
def test_verify_sees_factors_that_are_no_svd(
    output: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor], problem: str
) -> None:
    edit(output, "factors", f"model.layers.0.mlp.down_proj.{part}", change)
    assert problem in only(verify(output))


def of_another_run(output: Path, tmp_path: Path) -> Path:
    """An output on the same base whose gradients were others."""
    other = tmp_path / "other"
    write_output(Path(read_report(output)["config"]["model"]["name_or_path"]), other, max_shard_bytes=20_000, seed=2)
    return other


def test_verify_sees_factors_of_another_run(output: Path, tmp_path: Path) -> None:
    """Whole, orthonormal, with fitting checksums: rebuild would make a start of other data of them."""
    other = of_another_run(output, tmp_path)
    shutil.rmtree(output / "factors")
    shutil.copytree(other / "factors", output / "factors")
    write_checksums(output, World.alone())
    problems = verify(output).problems
    assert len(problems) == 6 and all("S is not what loraga_report.json says" in problem for problem in problems)
    # with the report's singular values, too
    report, of_other = read_report(output), read_report(other)
    for name, target in report["targets"].items():
        target["singular_values"] = of_other["targets"][name]["singular_values"]
    write_report(output, report | {"factors_fingerprint": of_other["factors_fingerprint"]})
    write_checksums(output, World.alone())
    problems = verify(output).problems
    assert len(problems) == 12 and all("is not made of factors" in problem for problem in problems)
    with pytest.raises(UserError, match="copy the output directory again"):
        write_report(output, report)
        rebuild(output, tmp_path / "rebuilt")


def test_verify_sees_triplets_beyond_those_of_the_start(output: Path) -> None:
    """No A0 and B0 are made of them, and a larger rank would be."""
    name = "model.layers.0.self_attn.q_proj"  # of rank 2: four triplets, and four more
    for part in ("U", "Vh"):
        edit(output, "factors", f"{name}.{part}", flipped)
    assert only(verify(output)) == "factors: its fingerprint is not the report's factors_fingerprint"
    with pytest.raises(UserError, match="is not of the run that its loraga_report.json tells of"):
        rebuild(output, output.parent / "rebuilt")


def flipped(columns: torch.Tensor) -> torch.Tensor:
    """The last singular vector with another sign."""
    columns = columns.clone()
    if columns.shape[0] == 8:
        columns[7] *= -1
    else:
        columns[:, 7] *= -1
    return columns


@pytest.mark.parametrize("changes", [{"scale": "unit"}, {"direction": "A2rBr"}, {"stable_gamma": 4.0}])
def test_verify_sees_another_way_to_start(output: Path, changes: dict[str, object]) -> None:
    """In the report and in resolved_config.yaml alike."""
    report = read_report(output)
    report["config"]["init"] = changes
    write_report(output, report)
    (output / "resolved_config.yaml").write_text(yaml.safe_dump(report["config"]))
    write_checksums(output, World.alone())
    assert sum("is not made of factors" in problem for problem in verify(output).problems) >= 6


def test_verify_sees_another_configuration_for_the_next_run(output: Path) -> None:
    path = output / "resolved_config.yaml"
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(config | {"calibration": {"max_length": 17}}))
    write_checksums(output, World.alone())
    assert only(verify(output)) == "resolved_config.yaml: section calibration is not what loraga_report.json says"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task_type", "SEQ_CLS"),
        ("base_model_name_or_path", "/elsewhere"),
        ("revision", "main"),
        ("bias", "all"),
        ("lora_dropout", 0.5),
        ("modules_to_save", ["lm_head"]),
        ("target_modules", ["q_proj"]),
        ("layers_to_transform", [0]),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("inference_mode", False),
    ],
)
@pytest.mark.parametrize("part", ["loraga_init", "loraga_offset"])
def test_verify_sees_another_adapter_config(output: Path, part: str, key: str, value: object) -> None:
    path = output / part / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    write_checksums(output, World.alone())
    assert any(f"{part}: adapter_config.json has {key} " in problem for problem in verify(output).problems)


def test_keys_of_a_newer_peft_are_passed_over_without_a_word(output: Path) -> None:
    path = output / "loraga_init" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"two\nlines": 1}))
    write_checksums(output, World.alone())
    with warnings.catch_warnings(action="error"):
        assert verify(output).ok


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "additional_chat_templates/tool.jinja"])
def test_verify_sees_other_files_beside_the_weights(output: Path, name: str) -> None:
    path = output / "residual_base" / name
    path.write_text(path.read_text() + " ")
    write_checksums(output, World.alone())
    assert only(verify(output)) == f"residual_base/{name}: is not what loraga_report.json says"
    path.unlink()
    write_checksums(output, World.alone())
    assert f"residual_base/{name}: is missing" in verify(output).problems


@pytest.mark.parametrize(
    "name", ["residual_base/custom.py", "loraga_init/adapter_model.bin", "factors/x.json", "loraga_offset/deep/x.json"]
)
def test_verify_sees_unknown_files_with_fitting_checksums(output: Path, name: str) -> None:
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("{}")
    write_checksums(output, World.alone())
    assert only(verify(output)) == f"{name}: is not of this output"


def test_verify_names_what_stands_at_the_top_and_is_the_users(output: Path) -> None:
    (output / "trained").mkdir()
    (output / "trained" / "latest").symlink_to("gone")
    result = verify(output)
    assert result.ok and result.notes == ["trained is not of this output"]


@pytest.mark.parametrize(
    "name", ["loraga_report.json", "loraga_init/adapter_model.safetensors", "residual_base/config.json", "factors"]
)
def test_verify_names_links_and_does_not_follow_them(output: Path, tmp_path: Path, name: str) -> None:
    (output / name).rename(tmp_path / "moved")
    (output / name).symlink_to(tmp_path / "moved")
    assert f"{name}: is a symbolic link, which is not followed" in verify(output).problems
    assert all(name in problem for problem in verify(output).problems)


def test_verify_names_pipes_and_does_not_wait_for_them(output: Path) -> None:
    os.mkfifo(output / "residual_base" / "pipe")
    (output / "SHA256SUMS").unlink()
    os.mkfifo(output / "SHA256SUMS")
    assert verify(output).problems == [
        "SHA256SUMS: is neither a file nor a directory",
        "residual_base/pipe: is neither a file nor a directory",
    ]
    (output / "loraga_report.json").unlink()
    os.mkfifo(output / "loraga_report.json")
    (problem,) = verify(output).problems
    assert problem.startswith("loraga_report.json: cannot be read (loraga_report.json is no file)")


ODD_JSON = {
    "deep": "[" * 100_000,
    "deep_whole": '{"a":' * 300 + "1" + "}" * 300,
    "list": "[]",
    "number": "1" * 5000,
    "surrogate": '{"\\ud800": 1}',
    "nothing": "",
    "null": "null",
}


@pytest.mark.parametrize("text", ODD_JSON.values(), ids=ODD_JSON.keys())
def test_verify_of_odd_json_ends_in_a_line(output: Path, text: str) -> None:
    for name in (
        "loraga_report.json",
        "resolved_config.yaml",
        "loraga_init/adapter_config.json",
        "loraga_offset/adapter_config.json",
        "factors/factors.safetensors.index.json",
        "residual_base/model.safetensors.index.json",
        "residual_base/config.json",
    ):
        content = (output / name).read_bytes()
        (output / name).write_text(text)
        write_checksums(output, World.alone())
        problems = verify(output).problems
        assert problems and not any("\n" in problem for problem in problems), name
        (output / name).write_bytes(content)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", 10**400),
        ("lora_alpha", "8"),
        ("r", -1),
        ("r", 0),
        ("rank_pattern", {"(": 3}),
        ("rank_pattern", [1]),
        ("alpha_pattern", {".*": None}),
        ("target_modules", {"a": {"b": 1}}),
        ("peft_type", ["LORA"]),
        ("peft_type", "IA3"),
        ("task_type", 7),
        ("layer_replication", "x"),
        ("corda_config", 3),
        ("use_dora", "yes"),
    ],
)
def test_verify_of_odd_adapter_configs_ends_in_a_line(output: Path, key: str, value: object) -> None:
    path = output / "loraga_init" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    write_checksums(output, World.alone())
    problems = verify(output).problems
    assert problems and not any("\n" in problem for problem in problems)


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": {}},
        {"targets": {"x" * 10_000: None}},
        {"saved_parameters": {"a": "b"}},
        {"model_files": {"../../x": "0", "x" * 300: "0", "": "0"}},
        {"identity_check": {"max_abs_logit_diff": 0, "max_abs_logit": 0, "dtype": "int3"}},
        {"rank_budget": {"parameters": 1, "spent": 10**30}},
        {"config": {"model": {"name_or_path": "a\0b"}, "output": {"dir": "x"}}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_verify_of_odd_reports_ends_in_a_line(output: Path, changes: dict[str, object]) -> None:
    write_report(output, read_report(output) | changes)
    write_checksums(output, World.alone())
    problems = verify(output).problems
    assert problems and not any("\n" in problem for problem in problems)


def test_verify_reads_outputs_of_earlier_versions_and_says_what_it_could_not_check(output: Path) -> None:
    report = read_report(output)
    for key in ("adapter_fingerprint", "factors_fingerprint", "model_files"):
        del report[key]
    write_report(output, report)
    write_checksums(output, World.alone())
    result = verify(output)
    missing = "adapter_fingerprint, factors_fingerprint, model_files"
    assert result.ok and result.notes == [
        f"loraga_report.json is of an earlier version and has no {missing}: not checked"
    ]


def test_verify_of_something_else(tmp_path: Path) -> None:
    assert "is this the directory of a finished run" in only(verify(tmp_path))
    write_report(tmp_path, {"schema_version": 2})
    assert "schema_version" in only(verify(tmp_path))
