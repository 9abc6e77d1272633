"""What is free for a run: the machine's memory, what cgroups leave of their limits; and the peak of what it takes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from loraga_dist.ranks.memory import PeakMemory, cgroup_free_bytes, free_host_bytes

MIB = 2**20


def write_group(directory: Path, *, limit: str, current: int, inactive_file: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.current").write_text(f"{current}\n")
    (directory / "memory.stat").write_text(f"anon {current - inactive_file}\nfile 5\ninactive_file {inactive_file}\n")


def test_a_container_has_what_is_left_of_its_limit(tmp_path: Path) -> None:
    write_group(tmp_path, limit=str(1000 * MIB), current=700 * MIB, inactive_file=100 * MIB)
    assert cgroup_free_bytes(tmp_path, "/") == [400 * MIB]


def test_groups_above_count_and_those_without_a_limit_do_not(tmp_path: Path) -> None:
    write_group(tmp_path / "pod" / "job", limit="max", current=50 * MIB, inactive_file=0)
    write_group(tmp_path / "pod", limit=str(200 * MIB), current=150 * MIB, inactive_file=20 * MIB)
    # the root of the hierarchy has none of these files
    assert cgroup_free_bytes(tmp_path, "/pod/job") == [70 * MIB]
    write_group(tmp_path / "pod" / "job", limit=str(60 * MIB), current=50 * MIB, inactive_file=0)
    assert cgroup_free_bytes(tmp_path, "/pod/job") == [10 * MIB, 70 * MIB]


def test_more_in_use_than_a_lowered_limit_leaves_nothing(tmp_path: Path) -> None:
    write_group(tmp_path, limit=str(10 * MIB), current=11 * MIB, inactive_file=0)
    assert cgroup_free_bytes(tmp_path, "/") == [0]


def test_no_hierarchy_no_limit(tmp_path: Path) -> None:
    assert cgroup_free_bytes(tmp_path, "/elsewhere/that/is/not/shown") == []


def test_free_memory_is_part_of_the_machines() -> None:
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    swap_kib = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("SwapTotal:"))
    assert 0 < free_host_bytes() < total_bytes + 1024 * int(swap_kib.split()[1])


def test_peak_memory_sees_what_is_gone_at_the_end() -> None:
    with PeakMemory(torch.device("cpu")) as memory:
        taken = torch.ones(256 * MIB // 4)
        time.sleep(0.05)  # a few samples
        taken_bytes = taken.nbytes
        del taken
    assert 0.9 * taken_bytes < memory.peak_bytes < 2 * taken_bytes
