"""What `loraga_dist.initialize` cannot do right it refuses, on every rank, in one line that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import save_model
from launching import run_ranks, succeed

WORKER = str(Path(__file__).with_name("refusal_worker.py"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("refusals") / "model")


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("optimizer", "call loraga_dist.initialize before deepspeed.initialize"),
        ("unsharded", "load it under ZeRO-3"),
        ("nvme", "write cpu or none"),
        ("hpz", "zero_hpz_partition_size"),
        ("no-labels", "labels"),
        ("one-rank-empty", "give every rank at least one"),
    ],
)
def test_refused_on_both_ranks(model: Path, case: str, said: str) -> None:
    results = run_ranks([WORKER, str(model), case], 2)
    succeed(results)
    for result in results:
        assert result.stdout.startswith("2 ") and said in result.stdout, result.stdout
        assert len(result.stdout.splitlines()) == 1
