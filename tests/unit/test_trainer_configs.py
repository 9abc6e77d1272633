"""The configuration lines in the output's README.md, against the keys that the trainers' releases know."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from loraga_dist.publish.text import readme

KEYS = json.loads((Path(__file__).parents[1] / "golden" / "trainer_keys.json").read_text())
OUT = "/data/runs: 1 #/out"
"""A directory that YAML would misread unquoted."""

REPORT: dict[str, Any] = {
    "config": {
        "output": {"dir": OUT, "residual_base": "full"},
        "model": {"name_or_path": "base", "revision": None},
        "init": {"scheme": "lora_ga"},
        "lora": {"task_type": "CAUSAL_LM", "use_dora": False},
    },
    "targets": {"t": {"offset_ratio": 0.1}},
}
EXPECTED = {
    "Axolotl": ("axolotl", {"base_model": "residual_base", "lora_model_dir": "loraga_init"}),
    "LLaMA-Factory": ("llamafactory", {"model_name_or_path": "residual_base", "adapter_name_or_path": "loraga_init"}),
    "ms-swift": ("ms_swift", {"model": "residual_base", "adapters": "loraga_init"}),
}


def test_every_trainer_has_its_lines() -> None:
    assert re.findall(r"^(\S+):\n\n```yaml$", readme(REPORT), flags=re.MULTILINE) == list(EXPECTED)


@pytest.mark.parametrize("trainer", EXPECTED)
def test_lines_are_what_the_trainer_knows(trainer: str) -> None:
    text = readme(REPORT)
    block = re.search(rf"^{trainer}:\n\n```yaml\n(.*?)```", text, flags=re.MULTILINE | re.DOTALL)
    assert block is not None
    config = yaml.safe_load(block[1])
    package, directories = EXPECTED[trainer]
    assert set(config) <= set(KEYS[package]["keys"])
    for key, directory in directories.items():
        assert config[key] in (f"{OUT}/{directory}", [f"{OUT}/{directory}"])


def test_learning_rate_ratios_are_known_by_these_names() -> None:
    text = " ".join(readme(REPORT).split())
    for name, packages in {"loraplus_lr_ratio": ("axolotl", "llamafactory"), "lorap_lr_ratio": ("ms_swift",)}.items():
        assert f"`{name}` in" in text
        assert all(name in KEYS[package]["keys"] for package in packages)
