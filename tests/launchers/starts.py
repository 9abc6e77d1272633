"""Two output directories hold the same start."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from loraga_dist.artifacts.names import ADAPTER_WEIGHTS, LORAGA_INIT, REPORT


def adapter_products(directory: Path) -> dict[str, torch.Tensor]:
    """B0 A0 of every target, which no sign or split of the factors can hide a difference in."""
    tensors = load_file(directory / LORAGA_INIT / ADAPTER_WEIGHTS)
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in names}


def largest_difference(directory: Path, reference: Path) -> float:
    """Over all targets, relative to the reference's norm."""
    ours, theirs = adapter_products(directory), adapter_products(reference)
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs)


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
        """Until a run that writes this directory has saved its state for the first time."""
        deadline = time.monotonic() + seconds
        while not list(directory.parent.glob(f".{directory.name}.checkpoint/0*")):
            assert time.monotonic() < deadline, f"no checkpoint of {directory} after {seconds} s"
            time.sleep(0.02)

    def require_same_start(self, directory: Path, world_size: int = 2) -> None:
        assert json.loads((directory / REPORT).read_text())["world_size"] == world_size
        assert largest_difference(directory, self.reference) < 1e-4
