"""The report's figures in TensorBoard's own event files, read by TensorBoard."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from builders import config_tree, save_data, save_model
from outputs import read_report

from loraga_dist.artifacts.report import Report
from loraga_dist.cli import init_main, main
from loraga_dist.publish.tracking import figures

needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="pip install tensorboard")


def run(root: Path, *arguments: str) -> int:
    tree = config_tree(save_model(root / "base"), save_data(root / "data.jsonl"), root / "out")
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    return init_main(["--config", str(root / "config.yaml"), *arguments])


@needs_tensorboard
def test_figures_are_those_of_the_report(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(tmp_path, "--output.report_to", "[tensorboard]") == 0
    report = read_report(tmp_path / "out")
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    found = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    expected = {
        "num_supervised_tokens": report["num_supervised_tokens"],
        "mean_loss": report["mean_loss"],
        "peak_bytes_per_rank/0": report["peak_bytes_per_rank"][0],
        **{f"seconds/{phase}": seconds for phase, seconds in report["seconds"].items()},
        **{f"captured_energy/{name}": target["captured_energy"] for name, target in report["targets"].items()},
        **{f"offset_ratio/{name}": target["offset_ratio"] for name, target in report["targets"].items()},
    }
    for tag, value in expected.items():
        assert found[tag] == pytest.approx(value, rel=1e-6), tag
    # a directory that was added to is as whole as before
    assert main(["verify", str(tmp_path / "out")]) == 0


@needs_tensorboard
def test_what_a_start_without_gradients_does_not_know_is_left_out(tmp_path: Path) -> None:
    assert run(tmp_path, "--output.report_to", "tensorboard", "--init.scheme", "pissa") == 0
    report = Report.read(tmp_path / "out")
    logged = dict(figures(report))
    assert "mean_loss" not in logged and not any("captured_energy" in name for name in logged)
    assert all(f"offset_ratio/{target}" in logged for target in report.targets)


def test_nothing_is_logged_by_default(tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    assert not (tmp_path / "out" / "tensorboard").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_known_before_the_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # what Python itself takes for not installed
    assert run(tmp_path, "--output.report_to", name) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loraga-dist:")]
    assert line == f"loraga-dist: output.report_to: '{name}': is not installed; pip install {name}, or write none"
    assert not (tmp_path / "out").exists()


def test_an_unknown_tracker_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--output.report_to", "mlflow") == 2
    assert "output.report_to: 'mlflow'" in capsys.readouterr().err
