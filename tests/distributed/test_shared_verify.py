"""Ranks that verify a directory together find what one process finds, and each reads only its part."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from builders import config_tree, save_data, save_model
from outputs import flip_bit, make_output
from ranks import run_on_ranks

from loraga_dist.artifacts.verify import verify
from loraga_dist.ranks.world import World

FLIPPED = (
    "residual_base/model.safetensors",
    "factors/*.safetensors",
    "loraga_offset/adapter_model.safetensors",
    "README.md",
)


def verified_by_rank(directories: Sequence[Path]) -> tuple[list[list[str]], int]:
    """The problems of each directory that this rank was told of, and how many bytes it has read."""
    return verified(directories, World.start())


def verified(directories: Sequence[Path], world: World) -> tuple[list[list[str]], int]:
    num_bytes: list[int] = []
    problems = [sorted(verify(path, world=world, on_progress=num_bytes.append).problems) for path in directories]
    return problems, sum(num_bytes)


def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    data = save_data(tmp_path / "data.jsonl", rows=4)
    directories = [make_output(config_tree(save_model(tmp_path / "base"), data, tmp_path / "out"))]
    for i, pattern in enumerate(FLIPPED):
        directories.append(shutil.copytree(directories[0], tmp_path / f"flipped{i}"))
        flip_bit(sorted(directories[-1].glob(pattern))[0], position=-2, bit=16)

    alone, num_bytes = verified(directories, World.alone())
    assert alone[0] == [] and all(alone[1:])
    ranks = run_on_ranks(verified_by_rank, 2, directories)
    for problems, _ in ranks:
        assert problems == alone
    assert sum(read for _, read in ranks) == num_bytes
    assert max(read for _, read in ranks) < 0.8 * num_bytes


def verified_apart(directories: Sequence[Path]) -> list[str]:
    """What every rank is told where each sees a directory of its own, as behind a network file system that lags."""
    world = World.start()
    return verify(directories[world.rank], world=world).problems


def test_ranks_that_see_different_reports_say_so(tmp_path: Path) -> None:
    data = save_data(tmp_path / "data.jsonl", rows=4)
    out = make_output(config_tree(save_model(tmp_path / "base"), data, tmp_path / "out"))
    other, without = (shutil.copytree(out, tmp_path / name) for name in ("other", "without"))
    report = other / "loraga_report.json"
    report.write_text(report.read_text().replace(".q_proj", ".p_proj"))
    (without / "loraga_report.json").unlink()
    for seen in (other, without):
        told = run_on_ranks(verified_apart, 2, [out, seen])
        assert told[0] == told[1]
        assert "loraga_report.json: ranks [1] see another one than rank 0" in told[0]
    told = run_on_ranks(verified_apart, 2, [without, out])
    assert told[0] == told[1] and "is this the directory of a finished run" in told[0][0]
