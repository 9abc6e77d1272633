"""A random rank is killed in every phase; the others end, nothing half-written loads, the same command completes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from builders import config_tree, save_data, save_model
from launching import INIT, collect_ranks, run_ranks, start_ranks, succeed
from safetensors.torch import load_file

from loraga_dist.artifacts.verify import verify

# what is there once a phase has begun, and how long it lasts about
PHASES = {
    "load": (".out.partial", 1.0),
    "calibrate": (".out.checkpoint/0*", 1.5),
    "factorize": (".out.checkpoint/0*", 3.0),
    "write": (".out.partial/factors", 0.2),
    "verify": (".out.partial/loraga_report.json", 0.2),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output directory that nothing disturbed, with its config beside it."""
    root = tmp_path_factory.mktemp("faults")
    base, data = save_model(root / "base"), save_data(root / "data.jsonl", rows=40)
    tree = config_tree(base, data, root / "out", kind="llama", r=4)
    tree["calibration"] |= {"per_device_batch_size": 1}
    tree["gradient"] |= {"max_targets_in_flight": 11}
    tree["checkpoint_minutes"] = 0.003
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    succeed(run_ranks([INIT, "--config", str(root / "config.yaml")], 2))
    return root / "out"


def test_the_same_command_completes(expected: Path, tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    phase = list(PHASES)[seed % len(PHASES)]
    command = [INIT, "--config", str(expected.parent / "config.yaml"), "--output.dir", str(tmp_path / "out")]
    processes = start_ranks(command, 2)
    victim = dice.randrange(2)
    pattern, seconds = PHASES[phase]
    started = time.monotonic()
    while not any(tmp_path.glob(pattern)) and processes[victim].poll() is None and time.monotonic() - started < 100:
        time.sleep(0.005)
    time.sleep(dice.uniform(0, seconds))
    with contextlib.suppress(ProcessLookupError):  # it may have finished just before
        os.kill(processes[victim].pid, signal.SIGKILL)
    killed_at = time.monotonic()
    results = collect_ranks(processes, timeout_seconds=100)
    survivor = results[1 - victim]
    if results[victim].code == -signal.SIGKILL and survivor.code:
        assert survivor.code == 3, survivor.stderr
        # who dies while the others wait for it to join a group is missed by its silence, not by a lost connection
        named = (f"loraga-dist: rank {victim} is gone", f"loraga-dist: rank {victim} gave no sign of life")
        assert any(line in survivor.stderr for line in named), survivor.stderr
        assert time.monotonic() - killed_at < 60
    if (tmp_path / "out").exists():
        assert verify(tmp_path / "out").problems == [], "an output that is there is whole"
        command.append("--overwrite")

    succeed(run_ranks(command, 2))
    assert verify(tmp_path / "out").problems == []
    file = "loraga_init/adapter_model.safetensors"
    found, wanted = load_file(tmp_path / "out" / file), load_file(expected / file)
    assert all(torch.allclose(found[key], wanted[key], rtol=0, atol=1e-4 * wanted[key].abs().max()) for key in wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
