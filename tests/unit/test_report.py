"""The one typed report: what it writes is what it reads, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import report_tree, target_tree

from loraga_dist.artifacts.report import IdentityCheck, Rebuilt, Report, TargetReport
from loraga_dist.config import InitConfig, ModelConfig, OutputConfig
from loraga_dist.errors import RunError
from loraga_dist.files.disk import MAX_JSON_BYTES, MAX_NUMBERS_BYTES, json_text


def written(report: Report, directory: Path) -> dict[str, Any]:
    report.write(directory / "loraga_report.json")
    return json.loads((directory / "loraga_report.json").read_text())


def test_what_is_read_is_written_again_in_the_same_order(tmp_path: Path) -> None:
    tree = report_tree(
        targets={"u": target_tree(lora_alpha=3.5, transposed=True)}, rank_budget={"parameters": 9, "spent": 8}
    )
    report = Report.parse(json.dumps(tree))
    again = written(report, tmp_path)
    assert again.pop("config") == report.config.model_dump() and tree.pop("config")
    assert json.dumps(again) == json.dumps(tree)
    assert Report.read(tmp_path) == report
    assert "rebuilt" not in again


def test_keys_of_other_versions_are_passed_over(tmp_path: Path) -> None:
    config = {"news": {}, "lora": {"news": 1}, "calibration": {"news": None}}
    tree = report_tree(config=config, news=1, targets={"t": {"news": 1}}, identity_check={"news": 1})
    assert Report.parse(json.dumps(tree)) == Report.parse(json.dumps(report_tree()))


def test_what_json_cannot_say_is_null(tmp_path: Path) -> None:
    nan = math.nan
    target = TargetReport(**target_tree(offset_ratio=math.inf, split_half_cosine=nan))
    assert target.offset_ratio is None and target.split_half_cosine is None
    check = IdentityCheck(max_abs_logit_diff=nan, max_abs_logit=1.0, dtype="float32")
    report = Report(**report_tree(mean_loss=nan) | {"identity_check": check})
    tree = written(report, tmp_path)
    assert tree["mean_loss"] is None and tree["identity_check"]["max_abs_logit_diff"] is None
    assert Report.read(tmp_path).targets == report.targets


def test_a_start_from_memory_claims_no_more_than_it_knows(tmp_path: Path) -> None:
    config = InitConfig(model=ModelConfig(name_or_path="base"), output=OutputConfig(dir="out"))
    report = Report(schema_version=1, config=config, base_fingerprint="sha256:1", residual_fingerprint=None, targets={})
    tree = written(report, tmp_path)
    assert tree["config"] == {"model": {"name_or_path": "base"}, "output": {"dir": "out"}}
    assert tree["seconds"] == {} and tree["mean_loss"] is None and tree["identity_check"] is None
    assert Report.read(tmp_path).config == config


def test_a_rebuilt_output_says_from_what(tmp_path: Path) -> None:
    report = Report.parse(json.dumps(report_tree()))
    tree = written(report.model_copy(update={"rebuilt": Rebuilt(source="/old", seconds=1.5)}), tmp_path)
    assert tree["rebuilt"] == {"source": "/old", "seconds": 1.5} and list(tree)[-1] == "rebuilt"


def test_what_is_written_of_very_many_experts_is_read(tmp_path: Path) -> None:
    """30,000 of rank 128 have more than other JSON may."""
    singular_values = torch.rand(256, generator=torch.Generator().manual_seed(0)).mul(1e-5).tolist()
    target = target_tree(r=128, singular_values=singular_values)
    report = Report.parse(json.dumps(report_tree(targets={"t": target})))
    tree = written(report, tmp_path)
    with (tmp_path / "loraga_report.json").open("ab") as file:
        file.write(b" " * MAX_JSON_BYTES)
    assert Report.read(tmp_path) == report
    assert 200_000 * len(json_text({"targets": tree["targets"]})) < MAX_NUMBERS_BYTES


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps({"schema_version": 2}), "loraga_report.json: schema_version: .*is 2, this version reads 1"),
        (
            json.dumps(report_tree(config={"init": {"scheme": "pizza"}})),
            "config.init.scheme: Input should be 'lora_ga'",
        ),
        (json.dumps(report_tree(targets={"t": {"r": 0}})), "targets.t.r: Input should be greater than 0"),
        ("[]", "loraga_report.json: the file: "),
        ("{", "loraga_report.json: the file: Invalid JSON"),
    ],
)
def test_what_is_no_report_is_named(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "loraga_report.json").write_text(content)
    with pytest.raises(RunError, match=said):
        Report.read(tmp_path)


def test_a_report_that_cannot_be_read_or_written_is_a_failed_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is this the directory of a finished run"):
        Report.read(tmp_path)
    (tmp_path / "loraga_report.json").write_bytes(b"\xff")
    with pytest.raises(RunError, match="cannot be read"):
        Report.read(tmp_path)
    with pytest.raises(RunError, match="cannot be written"):
        Report.parse(json.dumps(report_tree())).write(tmp_path / "missing" / "report.json")
