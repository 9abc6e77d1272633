"""What `loraga_dist.initialize` cannot do right it refuses, on every rank, in one line that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import save_model
from launching import Finished, run_ranks, succeed

WORKER = str(Path(__file__).with_name("refusal_worker.py"))

CASES = {
    # name: what to write instead; one process group runs them in this order
    "nvme": "write cpu or none",
    "hpz": "zero_hpz_partition_size",
    "no-labels": "labels",
    "one-rank-empty": "give every rank at least one",
    "unsharded": "load it under ZeRO-3",
    "dora": "make the start with loraga-dist init",
    "optimizer": "call loraga_dist.initialize before deepspeed.initialize",
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Finished]:
    model = save_model(tmp_path_factory.mktemp("refusals") / "model")
    return run_ranks([WORKER, str(model), *CASES], 2)


def test_nothing_else_is_said(ranks: list[Finished]) -> None:
    succeed(ranks)
    assert [len(rank.stdout.splitlines()) for rank in ranks] == [len(CASES)] * 2


@pytest.mark.parametrize("case", CASES)
def test_refused_on_both_ranks(ranks: list[Finished], case: str) -> None:
    for rank in ranks:
        lines = [line for line in rank.stdout.splitlines() if line.startswith(f"{case}: ")]
        assert len(lines) == 1, (rank.stdout, rank.stderr)
        assert lines[0].startswith(f"{case}: 2 ") and CASES[case] in lines[0]
