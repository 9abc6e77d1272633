"""The one definition of an output's parts, before a run and from its report, against what a run leaves on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import config_tree, save_data, save_model

from loraga_dist.artifacts.layout import Layout, strangers
from loraga_dist.artifacts.report import Report
from loraga_dist.cli import init_main, main
from loraga_dist.config import load_config
from loraga_dist.files.safetensors_io import TensorSlot, read_header
from loraga_dist.files.stored_tensors import entries_of
from loraga_dist.model.base import read_checkpoint_index
from loraga_dist.ranks.world import World
from loraga_dist.request.request import understand

HEAD = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "nothing but adapters": {"init": {"scheme": "pissa"}, "output": {"residual_base": "none"}},
    "dora": {"lora": {"use_dora": True}, "output": {"residual_base": "none"}},
    "dora with a head": {"lora": {"use_dora": True, **HEAD}},
    "unchanged base": {"init": {"scheme": "lora_one"}, "lora": {"use_dora": True, **HEAD}},
    "plain lora": {"init": {"scheme": "kaiming"}, "lora": HEAD},
    "weights, wider": {"init": {"scheme": "olora"}, "output": {"residual_dtype": "float32"}, "dtype": torch.bfloat16},
    "sketch": {"gradient": {"engine": "sketch"}, "lora": HEAD, "dtype": torch.bfloat16},
    "conv1d": {"kind": "gpt2", "lora": {"use_dora": True}},
    "patterns": {"lora": {"rank_pattern": {"down_proj": 2}}},
}
Run = Callable[..., tuple[Layout, Path]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The layout before a run under these settings, and the output that the run made."""
    root = tmp_path_factory.mktemp("layout")
    data = save_data(root / "data.jsonl")

    def get(kind: str = "llama", dtype: torch.dtype = torch.float32, **sections: dict[str, Any]) -> tuple[Layout, Path]:
        base, out = root / f"{kind}-{dtype}", root / f"out{len(list(root.glob('out*.yaml')))}"
        if not base.exists():
            save_model(base, kind, dtype=dtype)
        config = out.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(config_tree(base, data, out, kind=kind, **sections)))
        planned = Layout.of(understand(load_config(config), World.alone()))
        assert init_main(["--config", str(config)]) == 0
        return planned, out

    return get


def stored(out: Path) -> dict[str, dict[str, TensorSlot]]:
    """The tensors of every directory with weights."""
    found: dict[str, dict[str, TensorSlot]] = {}
    for path in out.rglob("*.safetensors"):
        found.setdefault(path.parent.name, {}).update(read_header(path))
    return found


def num_bytes(tensors: dict[str, TensorSlot]) -> int:
    return sum(slot.num_bytes for slot in tensors.values())


@pytest.mark.parametrize("case", CASES)
def test_what_is_planned_is_what_is_written(run: Run, case: str) -> None:
    planned, out = run(**CASES[case])
    report, found = Report.read(out), stored(out)
    assert found.keys() == set(planned.directories)
    assert planned.num_bytes == {name: num_bytes(found.get(name, {})) for name in planned.num_bytes}
    assert planned.missing_files(out) == []
    base = entries_of(read_checkpoint_index(Path(report.config.model.name_or_path)))
    for layout in (planned, Layout.of_report(report, base)):
        assert layout.adapters == {name: entries_of(found[name]) for name in layout.adapters}
        assert "residual_base" not in found or layout.residual == entries_of(found["residual_base"])
        assert layout.directories == planned.directories and layout.files == planned.files
    assert planned.factors == entries_of(found.get("factors", {}))
    written = {path.name for path in (out / "residual_base").glob("*.safetensors")}
    assert {file.name for file in planned.residual_files} == written


def test_a_rank_budget_bounds_the_adapters(run: Run) -> None:
    planned, out = run(init={"rank_budget": 6000}, lora={"use_dora": True})
    found, settled = stored(out), Layout.of_report(Report.read(out))
    magnitudes = 4 * sum(target.M for target in planned.targets)
    assert planned.num_bytes["loraga_offset"] == 4 * 6000
    assert planned.num_bytes["loraga_init"] == 4 * 6000 + magnitudes
    for name in ("loraga_init", "loraga_offset"):
        assert settled.num_bytes[name] == num_bytes(found[name]) <= planned.num_bytes[name]
    assert planned.num_bytes["factors"] == num_bytes(found["factors"])


def test_a_model_without_weights_is_laid_out_by_its_shapes(tmp_path: Path) -> None:
    tree = config_tree(save_model(tmp_path / "base"), save_data(tmp_path / "data.jsonl"), tmp_path / "out", lora=HEAD)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(tmp_path / "config.yaml")
    whole = Layout.of(understand(config, World.alone()))
    for path in (tmp_path / "base").glob("*.safetensors*"):
        path.unlink()
    by_shapes = Layout.of(understand(config, World.alone(), needs_weights=False, reads_data=False))
    assert by_shapes.num_bytes == whole.num_bytes


def test_every_missing_file_is_named(run: Run) -> None:
    planned, out = run()
    assert len(planned.files) > 7
    for name in planned.files:
        (out / name).rename(out / "away")
        assert planned.missing_files(out) == [name]
        (out / "away").rename(out / name)


def test_all_that_stands_in_an_output_is_its_own(run: Run, tmp_path: Path) -> None:
    _, out = run(output={"residual_base": "none", "report_to": "tensorboard"})
    assert strangers(out) == [] and strangers(tmp_path) is None
    assert main(["materialize-base", str(out)]) == 0
    assert strangers(out) == []
    for name in ("loraga_init/checkpoint-5/adapter_model.safetensors", "notes.txt"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).touch()
    assert strangers(out) == ["loraga_init/checkpoint-5/adapter_model.safetensors", "notes.txt"]


def test_what_was_saved_where_parts_of_an_output_are_is_not_its_own(run: Run) -> None:
    _, out = run(output={"residual_base": "none", "report_to": "tensorboard"})
    trained = ["loraga_init/adapter_model.safetensors", "loraga_offset/adapter_config.json"]
    for name in trained:
        (out / name).write_bytes((out / name).read_bytes() + b" ")
    added = [
        "residual_base/checkpoint-5/model.safetensors",
        "residual_base/notes.txt",
        "tensorboard/events.of/notes.txt",
    ]
    for name in added:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    assert strangers(out) == [*trained, *added]


def test_what_stands_where_no_residual_base_can_come_is_not_the_outputs_own(run: Run) -> None:
    _, out = run(init={"scheme": "lora_one"})
    (out / "residual_base").mkdir()
    (out / "residual_base" / "model.safetensors").touch()
    assert strangers(out) == ["residual_base/model.safetensors"]


@pytest.mark.parametrize("residual_base", ["full", "none"])
def test_a_model_that_was_saved_over_the_residual_base_is_not_the_outputs_own(
    run: Run, tmp_path: Path, residual_base: str
) -> None:
    _, out = run(output={"residual_base": residual_base})
    if residual_base == "none":
        assert main(["materialize-base", str(out)]) == 0
    copy = shutil.copytree(out, tmp_path / "copy", copy_function=shutil.copy)  # written at other times
    assert strangers(copy) == []
    for directory in (out, copy):
        weights = directory / "residual_base" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
        os.utime(weights, (0, 0))  # before all that tells of it
        assert strangers(directory) == ["residual_base/model.safetensors"]


def test_a_model_that_was_saved_where_a_residual_base_may_come_is_not_the_outputs_own(run: Run) -> None:
    _, out = run(output={"residual_base": "none"})
    save_model(out / "residual_base")
    assert "residual_base/model.safetensors.index.json" in strangers(out)


def test_weights_are_known_by_when_they_were_written(run: Run) -> None:
    _, out = run()
    noted = {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert Report.read(out).weights_written_ns == noted
