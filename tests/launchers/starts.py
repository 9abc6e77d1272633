"""A run that launchers make again, and the start that each has to give."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from outputs import read_products, read_report, relative

SLOWLY = ["--calibration.per_device_batch_size", "1", "--gradient.max_targets_in_flight", "3"]
"""The same start after many sweeps, each of them kept: time to disturb a run."""


@dataclass(frozen=True)
class TinyRun:
    """A run of seconds, and the single process's output of it."""

    config: Path
    reference: Path

    def arguments(self, directory: Path) -> list[str]:
        return ["launch/init.py", *self.options(directory)]

    def options(self, directory: Path) -> list[str]:
        return ["--config", str(self.config), "--output.dir", str(directory)]

    @staticmethod
    def wait_for_checkpoint(directory: Path, seconds: float = 90) -> None:
        """Until a run that writes this directory has saved something whole for the first time."""
        deadline = time.monotonic() + seconds
        while not list(directory.parent.glob(f".{directory.name}.checkpoint/[0-9f]*")):
            assert time.monotonic() < deadline, f"no checkpoint of {directory} after {seconds} s"
            time.sleep(0.02)

    def require_same_start(self, directory: Path, world_size: int = 2) -> None:
        assert read_report(directory)["world_size"] == world_size
        found, expected = read_products(directory), read_products(self.reference)
        assert found.keys() == expected.keys()
        assert max(relative(found[name], expected[name]) for name in expected) < 1e-4
