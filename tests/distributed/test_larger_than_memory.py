"""A start of a model that has no room in memory is, bit by bit, that of the same model in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import TASKS, config_tree, save_data, save_model
from outputs import make_output, read_report, write_config
from stopping import init_until

from loraga_dist.artifacts.verify import verify
from loraga_dist.forecast.forecaster import Forecaster


def from_disk(forecaster: Forecaster, *_: Any) -> Forecaster:
    (way,) = (way for way in forecaster.ways() if way.from_disk)
    return replace(forecaster, chosen=way)


@pytest.mark.parametrize(
    ("kind", "dtype", "changes"),
    [
        ("llama", "float32", {"lora": {"modules_to_save": ["lm_head"]}}),
        ("gpt2", "bfloat16", {}),
        ("llama", "float32", {"init": {"scheme": "pissa"}}),
        ("llama", "float32", {"lora": {"use_dora": True}}),
        ("llama", "float32", {"init": {"scheme": "rrr_step"}}),
        ("mixtral", "float32", {"lora": {"target_modules": ["q_proj", "v_proj"]}}),
        ("deepseek_v3", "bfloat16", {"lora": {"target_modules": ["q_b_proj", "o_proj"], "r": 2}}),
    ],
    ids=["saved-modules", "gpt2-bfloat16", "pissa", "dora", "rrr_step", "mixtral", "deepseek_v3-bfloat16"],
)
def test_from_disk_as_in_memory(
    kind: str, dtype: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = save_model(tmp_path / "base", kind), save_data(tmp_path / "data.jsonl", TASKS[kind])
    takes_gradient = changes.get("init", {}).get("scheme") != "pissa"
    gradient = {"order": "block"} if takes_gradient else {}
    reports = []
    for name in ("memory", "disk"):
        if name == "disk":  # as if no other way had room
            monkeypatch.setattr(Forecaster, "fitting", from_disk)
        tree = config_tree(base, data, tmp_path / name, kind=kind, gradient=gradient, **changes)
        tree["model"]["dtype"] = dtype
        assert verify(make_output(tree)).problems == []
        reports.append(read_report(tmp_path / name))
    memory, disk = reports
    for fingerprint in ("adapter_fingerprint", "factors_fingerprint", "residual_fingerprint", "base_fingerprint"):
        assert memory[fingerprint] == disk[fingerprint], fingerprint
    for figure in ("kl", "max_abs_logit_diff", "mean_loss_before", "mean_loss_after"):
        assert memory["identity_check"][figure] == disk["identity_check"][figure], figure
    if takes_gradient:
        weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        assert memory["calibration_bytes_read"] is None
        assert 0 < disk["calibration_bytes_read"] <= 2.1 * weights


def test_a_stopped_run_goes_on_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, data = save_model(tmp_path / "base"), save_data(tmp_path / "data.jsonl")
    monkeypatch.setattr(Forecaster, "fitting", from_disk)
    whole, stopped = (
        config_tree(base, data, tmp_path / name, gradient={"order": "block"}) for name in ("whole", "stopped")
    )
    make_output(whole)
    # one look after each of three blocks' forward and backward, and between
    assert init_until(5, write_config(stopped), []) == 143
    assert not (tmp_path / "stopped").exists()
    make_output(stopped)
    for fingerprint in ("adapter_fingerprint", "factors_fingerprint", "residual_fingerprint"):
        assert read_report(tmp_path / "stopped")[fingerprint] == read_report(tmp_path / "whole")[fingerprint]
