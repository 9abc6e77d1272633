"""A disk that is full, that fills up while a run writes, or that is read-only: exit 3 with the path, nothing lost."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from builders import config_tree, save_data, save_model
from disks import small_disk as small_disk
from launching import INIT, Finished, succeed
from outputs import write_config
from ranks import finish_on_ranks, run_script

from loraga_dist.artifacts.verify import verify
from loraga_dist.cli import init_main
from loraga_dist.ranks.words import leave_process


@pytest.fixture
def config(tmp_path: Path) -> Path:
    base, data = save_model(tmp_path / "base"), save_data(tmp_path / "data.jsonl")
    return write_config(config_tree(base, data, tmp_path / "out"))


def start(config: Path, out: Path, *options: str) -> list[Finished]:
    return run_script([INIT, "--config", str(config), "--output.dir", str(out), *options], 2)


def init_with_small_files(arguments: Sequence[str]) -> None:
    """On every rank: `init` where no file may have more than 40 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    leave_process(init_main(arguments))


def failure(ranks: list[Finished]) -> str:
    """The line that two ranks end with, before one that says how to go on."""
    assert [rank.code for rank in ranks] == [3, 3], ranks
    lines = [line for rank in ranks for line in rank.stderr.splitlines() if line.startswith("loraga-dist: ")]
    assert "Traceback" not in ranks[0].stderr, ranks
    assert all("the same command goes on from" in line for line in lines[1:]), ranks
    return lines[0]


def test_a_full_disk_is_seen_before_the_work(config: Path, small_disk: Path) -> None:
    out = small_disk / "out"
    succeed(start(config, out))
    filler = small_disk / "filler"
    filler.write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 50_000))
    said = failure(start(config, out, "--overwrite"))
    assert f"{out} needs " in said and "bytes and the disk has" in said and "calibrate" not in said
    assert verify(out).problems == [] and sorted(path.name for path in small_disk.iterdir()) == ["filler", "out"]


def test_a_read_only_disk(config: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    said = failure(start(config, small_disk / "out"))
    assert f"{small_disk} cannot be written (nothing can be made in {small_disk}): write another place" in said


def test_a_limit_met_while_writing(config: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a quota, or a disk that others fill: nobody could know it before."""
    out = tmp_path / "out"
    succeed(start(config, out))
    before = (out / "loraga_report.json").read_bytes()
    options = ["--config", str(config), "--overwrite", "--gradient.max_targets_in_flight", "7"]
    said = failure(finish_on_ranks(init_with_small_files, 2, options))
    assert "File too large" in said and f"{tmp_path}/.out." in said and "bytes" in said
    assert verify(out).problems == [] and (out / "loraga_report.json").read_bytes() == before

    succeed(start(config, out, "--overwrite", "--gradient.max_targets_in_flight", "7"))
    assert verify(out).problems == []
