"""Ranks are killed again and again, in every phase: the others end, nothing half-written loads, the same command
completes."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from builders import config_tree, save_data, save_model
from conftest import KILLS_PER_RUN
from launching import INIT, Finished, succeed
from outputs import captured_shares, make_output, read_products, write_config
from ranks import be_script, finish, run_script, started_on_ranks

from loraga_dist.artifacts.verify import verify

BEGINNINGS = {
    "load": ".out.partial/.unfinished*",
    "chunk": ".out.checkpoint/[0-9]*/state.json",
    "later block": ".out.checkpoint/finished-*/state.json",
    "write": ".out.partial/factors/*",
    "verify": ".out.partial/loraga_report.json",
}
"""By phase, in their order: the file that appears when it begins."""

LONGEST_SECONDS = {"load": 1.0, "chunk": 1.0, "later block": 1.0, "write": 0.2, "verify": 0.2}

CHUNKS: dict[str, tuple[str, ...]] = {"one chunk": (), "chunks": ("--gradient.chunk_microbatches", "5")}
"""Of the works' microbatches; the inputs of blocks are in files for the second. In one chunk nothing is saved within a
block, so that a run may end without that phase."""

ENGINES = {
    "exact": ("--gradient.engine", "exact"),
    "sketch": ("--gradient.engine", "sketch", "--gradient.oversampling", "24", "--gradient.refine_passes", "1"),
}


@dataclass(frozen=True)
class Undisturbed:
    """What runs that nothing disturbed have written, by engine, and the configuration they share."""

    config: Path
    outputs: dict[str, Path]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    root = tmp_path_factory.mktemp("faults")
    base, data = save_model(root / "base"), save_data(root / "data.jsonl", rows=40)
    tree = config_tree(
        base, data, root / "exact", calibration={"per_device_batch_size": 1}, gradient={"max_targets_in_flight": 11}
    )
    tree["checkpoint_minutes"] = 0.003
    outputs = {}
    for engine, options in ENGINES.items():
        tree["output"] = {"dir": str(root / engine)}
        outputs[engine] = make_output(tree, 2, *options)
    return Undisturbed(write_config(tree), outputs)


def marks(directory: Path, phase: str) -> set[tuple[str, int]]:
    """What a phase's beginning has left, told from what an earlier run left under the same name."""
    found = set()
    for path in directory.glob(BEGINNINGS[phase]):
        try:
            stat = path.stat()
        except FileNotFoundError:  # renamed, or removed, meanwhile
            continue
        found.add((str(path), stat.st_ctime_ns))
    return found


def run_and_kill(
    command: Sequence[str], directory: Path, num_ranks: int, victims: Sequence[int], phase: str, delay_seconds: float
) -> tuple[list[Finished], str | None, float]:
    """All ranks, of which some are killed so long after the phase has begun; the phase they were in, None if they had
    ended before; and how long the others went on."""
    before = {name: marks(directory, name) for name in BEGINNINGS}
    with started_on_ranks(be_script, num_ranks, command) as ranks:
        deadline = time.monotonic() + 100
        while not marks(directory, phase) - before[phase] and any(rank.poll() is None for rank in ranks):
            assert time.monotonic() < deadline, f"no {phase}: {finish(ranks, 0)}"
            time.sleep(0.002)
        time.sleep(delay_seconds)
        # what began may be gone again: the state before a sweep, once the sweep is done
        begun = [name for name in BEGINNINGS if marks(directory, name) - before[name]] or [phase]
        killed_at = time.monotonic()
        for victim in victims:
            if ranks[victim].poll() is None:
                os.kill(ranks[victim].pid, signal.SIGKILL)
        results = finish(ranks, 100)
    landed = all(results[victim].code == -signal.SIGKILL for victim in victims)
    return results, begun[-1] if landed else None, time.monotonic() - killed_at


def require_orderly_end(results: Sequence[Finished], victims: Sequence[int]) -> None:
    """The ranks that were not killed have ended with 3, and one of them says who is gone."""
    survivors = [result for rank, result in enumerate(results) if rank not in victims]
    assert all(survivor.code == 3 for survivor in survivors), results
    # who dies while the others wait for it to join a group is missed by its silence, not by a lost connection
    named = [f"loraga-dist: rank {rank} {how}" for rank in victims for how in ("is gone", "gave no sign of life")]
    words = "".join(survivor.stderr for survivor in survivors)
    assert not survivors or any(line in words for line in named), words


def test_the_same_command_completes(
    undisturbed: Undisturbed, tmp_path: Path, seed: int, record_property: Callable[[str, object], None]
) -> None:
    dice, out = random.Random(seed), tmp_path / "out"
    engine, chunks = list(ENGINES)[seed % len(ENGINES)], list(CHUNKS)[(seed + seed // 2) % len(CHUNKS)]
    command = [INIT, "--config", str(undisturbed.config), "--output.dir", str(out), *ENGINES[engine], *CHUNKS[chunks]]
    if chunks == "chunks":
        command += ["--gradient.activations_dir", str(tmp_path)]
    possible = [phase for phase in BEGINNINGS if phase != "chunk" or chunks == "chunks"]
    phases, num_ranks = dice.choices(possible, k=KILLS_PER_RUN), 2 + seed % 2
    for phase in phases:
        everyone = range(num_ranks)
        victims = list(everyone) if dice.random() < 0.2 else [dice.choice(everyone)]
        delay_seconds, landed = LONGEST_SECONDS[phase] * dice.random() ** 3, None
        while landed is None:
            overwrite = ["--overwrite"] if out.exists() else []
            results, landed, seconds = run_and_kill(
                [*command, *overwrite], tmp_path, num_ranks, victims, phase, delay_seconds
            )
            if landed is None:  # the run had ended: the same kill, earlier
                delay_seconds /= 4
                if delay_seconds < 1e-3:
                    earlier = list(BEGINNINGS).index(phase) - 1
                    assert earlier >= 0, results
                    phase = list(BEGINNINGS)[earlier]
        if out.exists():
            assert verify(out).problems == [], "an output that is there is whole"
        if [result for rank, result in enumerate(results) if rank not in victims and result.code == 0]:
            assert out.exists(), results
        else:
            require_orderly_end(results, victims)
        assert seconds < 60
        killed = "all ranks" if len(victims) == num_ranks else "one rank"
        of_kill = {"phase": landed, "engine": engine, "chunks": chunks, "ranks": num_ranks, "killed": killed}
        record_property("kill", of_kill)
        num_ranks = dice.choice([count for count in (1, 2, 3) if count != num_ranks])

    overwrite = ["--overwrite"] if out.exists() else []
    succeed(run_script([*command, *overwrite], num_ranks))
    assert verify(out).problems == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    require_same_start(out, undisturbed, engine)


def require_same_start(out: Path, undisturbed: Undisturbed, engine: str) -> None:
    """Equal products with the exact engine; with the sketch, whose windows differ with ranks, as much of the energy."""
    if engine == "exact":
        found, wanted = read_products(out), read_products(undisturbed.outputs["exact"])
        assert found.keys() == wanted.keys()
        assert all(
            torch.allclose(found[it], wanted[it], rtol=0, atol=1e-4 * wanted[it].abs().max().item()) for it in wanted
        )
        return
    exact = undisturbed.outputs["exact"]
    with_kills, without = captured_shares(out, exact), captured_shares(undisturbed.outputs[engine], exact)
    assert max(abs(with_kills[name] - without[name]) for name in without) < 1e-3
    assert min(with_kills.values()) > 0.999
