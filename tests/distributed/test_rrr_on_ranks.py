"""Reduced-rank regression on 1, 2 and 3 ranks, in both orders and by both engines; resumed; with chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders import config_tree, save_data, save_model
from outputs import angle_between_rows, make_output, read_adapter, read_report

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
    outs = [start(paths, f"{engine}-{order}", size, engine=engine, order=order) for size in SIZES]
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
