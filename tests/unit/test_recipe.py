"""The configuration that `loraga-dist config` prints: filled in, it is the defaults, and it names every key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from loraga_dist.cli import main
from loraga_dist.config import InitConfig, load_config, parse_config

FILLED_IN = {"model": {"name_or_path": "m"}, "calibration": {"data_files": "d.jsonl"}, "output": {"dir": "o"}}
DEFAULTS = parse_config(InitConfig, FILLED_IN).model_dump()


@pytest.fixture
def text(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["config"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) < 120
    for value in ("m", "d.jsonl", "o"):
        printed = re.sub(r": FILL_IN$", f": {value}", printed, count=1, flags=re.MULTILINE)
    return printed


def test_filled_in_it_is_the_defaults(text: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(text)
    config = load_config(tmp_path / "my.yaml")
    assert config.model_dump() == DEFAULTS
    assert {"engine", "max_length", "r"} <= {key for section in yaml.safe_load(text).values() for key in section}
    assert config.gradient.engine == "auto", "what is copied from it gets the sketch"


def test_every_key_can_be_uncommented_and_is_at_its_default(text: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(re.sub(r"^( *)#(?=\w)", r"\1", text, flags=re.MULTILINE))
    tree = yaml.safe_load((tmp_path / "my.yaml").read_text())
    assert tree == DEFAULTS
    assert load_config(tmp_path / "my.yaml").model_dump() == DEFAULTS
