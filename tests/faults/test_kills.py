"""A random rank is killed in every phase; the others end, nothing half-written loads, the same command completes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from builders import config_tree, save_data, save_model
from launching import INIT, Finished, succeed
from outputs import make_output, read_adapter
from ranks import be_script, finish, run_script, started_on_ranks

from loraga_dist.artifacts.verify import verify

PHASES = {
    "load": (".out.partial", 1.0),
    "calibrate": (".out.checkpoint/*0*", 1.5),
    "factorize": (".out.checkpoint/*0*", 3.0),
    "write": (".out.partial/factors", 0.2),
    "verify": (".out.partial/loraga_report.json", 0.2),
}
"""What is there once a phase has begun, and how many seconds it may last."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output directory that nothing disturbed, with its config beside it."""
    root = tmp_path_factory.mktemp("faults")
    base, data = save_model(root / "base"), save_data(root / "data.jsonl", rows=40)
    tree = config_tree(
        base, data, root / "out", calibration={"per_device_batch_size": 1}, gradient={"max_targets_in_flight": 11}
    )
    return make_output(tree | {"checkpoint_minutes": 0.003}, 2)


@pytest.fixture(scope="module")
def landed() -> dict[int, str]:
    """Phases in which a rank was killed before the run had ended, by seed."""
    return {}


def run_and_kill(
    command: Sequence[str], directory: Path, victim: int, pattern: str, delay_seconds: float
) -> tuple[list[Finished], float]:
    """Both ranks, of which one is killed so long after there is what the pattern finds; and how long they went on."""
    with started_on_ranks(be_script, 2, command) as ranks:
        deadline = time.monotonic() + 100
        while not any(directory.glob(pattern)):
            assert ranks[victim].poll() is None and time.monotonic() < deadline, f"no {pattern}: {finish(ranks, 0)}"
            time.sleep(0.005)
        time.sleep(delay_seconds)
        killed_at = time.monotonic()
        if ranks[victim].poll() is None:
            os.kill(ranks[victim].pid, signal.SIGKILL)
        results = finish(ranks, 100)
        return results, time.monotonic() - killed_at


def test_the_same_command_completes(expected: Path, tmp_path: Path, seed: int, landed: dict[int, str]) -> None:
    dice, phase = random.Random(seed), list(PHASES)[seed % len(PHASES)]
    pattern, longest_seconds = PHASES[phase]
    victim, delay_seconds = dice.randrange(2), dice.uniform(0, longest_seconds)
    command = [INIT, "--config", str(expected.with_suffix(".yaml")), "--output.dir", str(tmp_path / "out")]
    results, seconds = run_and_kill(command, tmp_path, victim, pattern, delay_seconds)
    while results[1 - victim].code == 0 and delay_seconds > 0.01:  # the run had ended: the same kill, earlier
        shutil.rmtree(tmp_path / "out")
        delay_seconds /= 2
        results, seconds = run_and_kill(command, tmp_path, victim, pattern, delay_seconds)
    survivor = results[1 - victim]
    assert (results[victim].code, survivor.code) == (-signal.SIGKILL, 3), results
    landed[seed] = phase
    # who dies while the others wait for it to join a group is missed by its silence, not by a lost connection
    named = (f"loraga-dist: rank {victim} is gone", f"loraga-dist: rank {victim} gave no sign of life")
    assert any(line in survivor.stderr for line in named), survivor.stderr
    assert seconds < 60
    if (tmp_path / "out").exists():
        assert verify(tmp_path / "out").problems == [], "an output that is there is whole"
        command.append("--overwrite")

    succeed(run_script(command, 2))
    assert verify(tmp_path / "out").problems == []
    found, wanted = read_adapter(tmp_path / "out"), read_adapter(expected)
    assert all(torch.allclose(found[key], wanted[key], rtol=0, atol=1e-4 * wanted[key].abs().max()) for key in wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_as_many_kills_landed_as_were_asked_for(landed: dict[int, str], pytestconfig: pytest.Config) -> None:
    num_kills = pytestconfig.getoption("--kills")
    assert sorted(landed) == list(range(num_kills))
    assert set(landed.values()) == set(list(PHASES)[:num_kills])
