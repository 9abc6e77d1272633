"""`calibration.max_samples: auto` stops at the same sample on 1 and 2 ranks, as if it had been told that number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import config_tree, save_data, save_model
from launching import INIT, run_ranks, succeed
from safetensors.torch import load_file

from loraga_dist.cli import init_main

GLOBAL_BATCH, ROWS, TARGET = 4, 70, 0.4
USED = ("num_sequences", "num_supervised_tokens", "data_fingerprint", "refine_passes")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("auto")
    return save_model(root / "model"), save_data(root / "data.jsonl", rows=ROWS)


def start(
    inputs: tuple[Path, Path],
    out: Path,
    world_size: int = 1,
    engine: str = "sketch",
    alpha: int = 8,
    **calibration: Any,
) -> Path:
    """Two sweeps, and a refine pass where the engine has one."""
    tree = config_tree(
        *inputs,
        out,
        r=2,
        lora={"lora_alpha": alpha},
        gradient={"engine": engine, "max_targets_in_flight": 12, "refine_passes": 1},
        calibration={"per_device_batch_size": GLOBAL_BATCH // world_size, "target_cosine": TARGET} | calibration,
        output={"residual_base": "none"},
    )
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(tree))
    if world_size == 1:
        assert init_main(["--config", str(config)]) == 0
    else:
        succeed(run_ranks([INIT, "--config", str(config)], world_size, timeout_seconds=200))
    return out


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "loraga_report.json").read_text())


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "loraga_init" / "adapter_model.safetensors")


@pytest.mark.parametrize("engine", ["exact", "sketch"])
def test_it_is_a_run_with_the_number_of_samples_it_found(
    inputs: tuple[Path, Path], tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    auto = start(inputs, tmp_path / "auto", engine=engine, max_samples="auto")
    summary = capsys.readouterr().out
    found = report(auto)
    assert found["stopped_by"] == "target_cosine"
    assert GLOBAL_BATCH * 4 < found["num_sequences"] < ROWS, "not at the first check, nor at the end"
    first_sweep = sorted(target["split_half_cosine"] for target in list(found["targets"].values())[:12])
    assert (first_sweep[5] + first_sweep[6]) / 2 >= TARGET
    assert (
        f"target_cosine; split-half cosine of the median target {found['split_half_cosine']:.3f} of {TARGET}" in summary
    )

    asked = start(inputs, tmp_path / "asked", engine=engine, max_samples=found["num_sequences"])
    assert report(asked)["stopped_by"] == "max_samples"
    assert {field: report(asked)[field] for field in USED} == {field: found[field] for field in USED}
    assert report(asked)["split_half_cosine"] == found["split_half_cosine"]
    for name, tensor in adapter(asked).items():
        assert torch.equal(tensor, adapter(auto)[name]), name


def test_ranks_decide_alike(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    alone = start(inputs, tmp_path / "alone", max_samples="auto")
    sharded = start(inputs, tmp_path / "sharded", 2, max_samples="auto")
    assert report(sharded)["stopped_by"] == "target_cosine"
    assert {field: report(sharded)[field] for field in USED} == {field: report(alone)[field] for field in USED}
    # The sketches of other shares see the rows in other unions.
    assert report(sharded)["split_half_cosine"] == pytest.approx(report(alone)["split_half_cosine"], abs=1e-3)


@pytest.mark.parametrize(
    ("calibration", "stopped_by", "num_sequences"),
    [
        ({"max_samples": "auto", "target_cosine": 0.999, "sample_limit": 18}, "sample_limit", 18),
        ({"max_samples": "auto", "target_cosine": 0.999}, "data", ROWS),
        ({"max_samples": ROWS}, "max_samples", ROWS),
        ({"max_samples": ROWS + 1}, "data", ROWS),
    ],
    ids=["limit", "auto-data", "number", "number-data"],
)
def test_the_report_says_what_ended_the_data(
    inputs: tuple[Path, Path], tmp_path: Path, calibration: dict[str, Any], stopped_by: str, num_sequences: int
) -> None:
    found = report(start(inputs, tmp_path / "out", engine="exact", **calibration))
    assert (found["stopped_by"], found["num_sequences"]) == (stopped_by, num_sequences)


def test_a_run_warns_of_what_it_found(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    (noisy,) = report(start(inputs, tmp_path / "noisy", engine="exact", max_samples=8))["warnings"]
    assert noisy.startswith("split_half_cosine below 0.5") and "raise calibration.max_samples" in noisy
    large, noisy = report(start(inputs, tmp_path / "large", engine="exact", alpha=64))["warnings"]
    assert large.startswith("offset_ratio above 1") and "in 21 of 21 targets" in large
    assert "all of the data was used; add more" in noisy
