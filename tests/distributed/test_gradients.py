"""The gradient of every Linear equals an unsharded float32 reference, however it is sharded and recomputed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import save_data, save_model
from launching import run_ranks, succeed

WORKER = str(Path(__file__).with_name("gradient_worker.py"))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_linear_matches_the_unsharded_reference(world_size: int, tmp_path: Path) -> None:
    model, data = save_model(tmp_path / "model"), save_data(tmp_path / "data.jsonl", rows=7)
    succeed(run_ranks([WORKER, str(model), str(data), str(tmp_path / "result.json")], world_size, timeout_seconds=280))
    result = json.loads((tmp_path / "result.json").read_text())

    assert len(set(result["tokens_per_rank"])) == world_size, "ranks should hold different numbers of tokens"
    assert len(result["cases"]) == 4
    for case in result["cases"]:
        assert case["targets"] == 22, case
        assert case["worst"] < 1e-5, case
        assert not case["left_gathered"] and not case["with_grad"], case
