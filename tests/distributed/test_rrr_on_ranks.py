"""Reduced-rank regression on 1, 2 and 3 ranks, in both orders and by both engines; resumed; with chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders import config_tree, save_data, save_model
from outputs import angle_between_rows, make_output, read_adapter, read_report, write_config
from ranks import run_on_ranks
from stopping import init_until

from loraga_dist.artifacts.verify import verify

SIZES = (1, 2, 3)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("rrr")
    return root, save_model(root / "llama"), save_data(root / "data.jsonl", rows=12)


def start(paths: tuple[Path, Path, Path], name: str, world_size: int, **gradient: Any) -> Path:
    root, model, data = paths
    tree = config_tree(model, data, root / f"{name}-{world_size}", init={"scheme": "rrr"}, gradient=gradient)
    return make_output(tree, world_size)


@pytest.mark.parametrize("order", ["block", "model"])
@pytest.mark.parametrize("engine", ["exact", "sketch"])
def test_ranks_find_the_same_rows(paths: tuple[Path, Path, Path], engine: str, order: str) -> None:
    sizes = SIZES if (engine, order) in (("exact", "block"), ("sketch", "model")) else SIZES[:2]
    outs = [start(paths, f"{engine}-{order}", size, engine=engine, order=order) for size in sizes]
    expected = read_adapter(outs[0])
    for out in outs:
        assert verify(out).ok
        report = read_report(out)
        assert report["order"] == order
        for target in report["targets"].values():
            assert 1 <= target["input_rank"] <= target["shape"][1]
        for key, tensor in read_adapter(out).items():
            if "lora_A" in key:
                assert angle_between_rows(tensor, expected[key]) < 1e-4, key
            assert (tensor - expected[key]).norm() <= 1e-4 * expected[key].norm(), key


def test_ranks_find_the_same_step(paths: tuple[Path, Path, Path]) -> None:
    root, model, data = paths
    found = []
    for size in SIZES:
        tree = config_tree(model, data, root / f"step-{size}", init={"scheme": "rrr_step"})
        out = make_output(tree, size)
        assert verify(out).ok and not (out / "residual_base").exists()
        report = read_report(out)
        step = report["step"]
        assert report["num_sequences"] == 9 and step["num_sequences"] == 3
        assert step["length"] == report["config"]["init"]["step"] > 0
        assert step["mean_loss_after"] < step["mean_loss_before"]
        found.append((step["length"], step["mean_loss_before"], step["mean_loss_after"], read_adapter(out)))
    (length, *losses, adapter), *others = found
    for other_length, *other_losses, other in others:
        assert other_length == length and other_losses == pytest.approx(losses, rel=1e-4)
        for key, tensor in adapter.items():
            assert (other[key] - tensor).norm() <= 1e-4 * tensor.norm(), key


def test_a_run_that_was_stopped_goes_on_with_the_inputs_it_has_seen(paths: tuple[Path, Path, Path]) -> None:
    root, model, data = paths
    gradient = {"order": "model", "engine": "exact"}
    tree = config_tree(model, data, root / "stopped", init={"scheme": "rrr"}, gradient=gradient)
    whole = read_adapter(start(paths, "whole", 1, **gradient))
    (code,) = run_on_ranks(init_until, 1, 4, write_config(tree), [])
    assert code == 143
    for key, tensor in read_adapter(make_output(tree, 2)).items():
        assert (tensor - whole[key]).norm() <= 1e-4 * whole[key].norm(), key


def test_an_encoder_decoders_padding_and_copies_do_not_count(tmp_path: Path) -> None:
    """Three samples on two ranks: the last microbatch of one is a copy."""
    model, data = save_model(tmp_path / "t5", "t5"), save_data(tmp_path / "data.jsonl", "SEQ_2_SEQ_LM", rows=3)
    outs = [
        make_output(config_tree(model, data, tmp_path / f"{size}", kind="t5", init={"scheme": "rrr"}), size)
        for size in (1, 2)
    ]
    found, expected = (read_adapter(out) for out in reversed(outs))
    for key, tensor in expected.items():
        assert (found[key] - tensor).norm() <= 1e-4 * tensor.norm(), key
