"""`verify` accepts what is whole, and sees whatever is not."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from handmade import edit, save_llama, write_output, write_report
from outputs import read_report
from safetensors.torch import load_file, save_file

from loraga_dist.artifacts.verify import VerifyResult, verify
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


def test_verify_accepts_a_finished_directory(llama: Path, output: Path) -> None:
    num_bytes: list[int] = []
    result = verify(output, on_progress=num_bytes.append)
    assert result == VerifyResult([], 6, result.max_rounding_units, residual_checked=True) and result.ok
    assert 0.5 < result.max_rounding_units <= 1
    listed = sum(path.stat().st_size for path in output.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    assert sum(num_bytes) == listed + sum(slot.num_bytes for slot in read_checkpoint_index(llama).values())


def test_verify_with_the_base_elsewhere(llama: Path, output: Path, tmp_path: Path) -> None:
    report = read_report(output)
    report["config"]["model"]["name_or_path"] = str(tmp_path / "gone")
    write_report(output, report)
    write_checksums(output, World.alone())
    result = verify(output)
    assert not result.residual_checked and [str(tmp_path / "gone") in problem for problem in result.problems] == [True]
    assert verify(output, base=llama).ok


def test_verify_without_residual_base(llama: Path, tmp_path: Path) -> None:
    write_output(llama, tmp_path / "out", residual_base="none")
    assert verify(tmp_path / "out") == VerifyResult([], 6, 0.0, residual_checked=False)
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
    assert len(problems) == 2 and all("down_proj.weight is" in p and "roundings away" in p for p in problems)


def test_verify_sees_offset_that_is_not_minus_the_init(output: Path) -> None:
    edit(output, "loraga_offset", adapter_key("0.mlp.down_proj", "B"), lambda tensor: -tensor)
    assert "loraga_offset" in only(verify(output)) and "lora_B" in only(verify(output))


def test_verify_sees_another_scaling(output: Path) -> None:
    for part in ("loraga_init", "loraga_offset"):
        path = output / part / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": False}))
    write_checksums(output, World.alone())
    assert len(verify(output).problems) == 6
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "pissa"}))
    write_checksums(output, World.alone())
    assert any("init_lora_weights true" in problem for problem in verify(output).problems)


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


def test_verify_of_something_else(tmp_path: Path) -> None:
    assert "is this the directory of a finished run" in only(verify(tmp_path))
    write_report(tmp_path, {"schema_version": 2})
    assert "schema_version" in only(verify(tmp_path))
