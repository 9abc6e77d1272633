"""Ranks that verify a directory together find what one process finds, and each reads only its part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml
from builders import config_tree, save_data, save_model
from launching import run_ranks, succeed

from loraga_dist.artifacts.verify import verify
from loraga_dist.cli import init_main

FLIPPED = (
    "residual_base/model.safetensors",
    "factors/*.safetensors",
    "loraga_offset/adapter_model.safetensors",
    "README.md",
)


def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    base, data, out = tmp_path / "base", tmp_path / "data.jsonl", tmp_path / "out"
    save_model(base, "llama")
    save_data(data, "CAUSAL_LM", rows=4)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(config_tree(base, data, out, kind="llama", r=4)))
    assert init_main(["--config", str(config)]) == 0
    directories = [out]
    for i, pattern in enumerate(FLIPPED):
        directories.append(tmp_path / f"flipped{i}")
        shutil.copytree(out, directories[-1])
        path = sorted(directories[-1].glob(pattern))[0]
        content = bytearray(path.read_bytes())
        content[-2] ^= 16
        path.write_bytes(content)
    script = Path(__file__).with_name("verify_worker.py")
    succeed(run_ranks([str(script), str(tmp_path), *map(str, directories)], 2))

    num_bytes: list[int] = []
    alone = [verify(directory, on_progress=num_bytes.append).problems for directory in directories]
    assert alone[0] == [] and all(alone[1:])
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for found, _ in ranks:
        assert [sorted(problems) for problems in found] == [sorted(problems) for problems in alone]
    assert sum(read for _, read in ranks) == sum(num_bytes)
    assert max(read for _, read in ranks) < 0.8 * sum(num_bytes)
