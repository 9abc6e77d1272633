"""`calibration.max_samples: auto` stops at the same sample on 1 and 2 ranks, as if it had been told that number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import config_tree, save_data, save_model
from outputs import make_output, read_adapter, read_report

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
    return make_output(tree, world_size)


@pytest.mark.parametrize("engine", ["exact", "sketch"])
def test_it_is_a_run_with_the_number_of_samples_it_found(
    inputs: tuple[Path, Path], tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    auto = start(inputs, tmp_path / "auto", engine=engine, max_samples="auto")
    summary = capsys.readouterr().out
    found = read_report(auto)
    assert found["stopped_by"] == "target_cosine"
    assert GLOBAL_BATCH * 4 < found["num_sequences"] < ROWS, "not at the first check, nor at the end"
    first_sweep = sorted(target["split_half_cosine"] for target in list(found["targets"].values())[:12])
    assert (first_sweep[5] + first_sweep[6]) / 2 >= TARGET
    assert (
        f"target_cosine; split-half cosine of the median target {found['split_half_cosine']:.3f} of {TARGET}" in summary
    )

    asked = start(inputs, tmp_path / "asked", engine=engine, max_samples=found["num_sequences"])
    assert read_report(asked)["stopped_by"] == "max_samples"
    assert {field: read_report(asked)[field] for field in USED} == {field: found[field] for field in USED}
    assert read_report(asked)["split_half_cosine"] == found["split_half_cosine"]
    for name, tensor in read_adapter(asked).items():
        assert torch.equal(tensor, read_adapter(auto)[name]), name


def test_ranks_decide_alike(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    alone = start(inputs, tmp_path / "alone", max_samples="auto")
    sharded = start(inputs, tmp_path / "sharded", 2, max_samples="auto")
    assert read_report(sharded)["stopped_by"] == "target_cosine"
    assert {field: read_report(sharded)[field] for field in USED} == {
        field: read_report(alone)[field] for field in USED
    }
    # The sketches of other shares see the rows in other unions.
    assert read_report(sharded)["split_half_cosine"] == pytest.approx(read_report(alone)["split_half_cosine"], abs=1e-3)


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
    found = read_report(start(inputs, tmp_path / "out", engine="exact", **calibration))
    assert (found["stopped_by"], found["num_sequences"]) == (stopped_by, num_sequences)


def test_a_run_warns_of_what_it_found(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    (noisy,) = read_report(start(inputs, tmp_path / "noisy", engine="exact", max_samples=8))["warnings"]
    assert noisy.startswith("split_half_cosine below 0.5") and "raise calibration.max_samples" in noisy
    large, noisy = read_report(start(inputs, tmp_path / "large", engine="exact", alpha=64))["warnings"]
    assert large.startswith("offset_ratio above 1") and "in 21 of 21 targets" in large
    assert "all of the data was used; add more" in noisy
