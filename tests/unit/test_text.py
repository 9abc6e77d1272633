"""The output's README.md: what it lists, that nothing breaks it, and trainers' lines against the keys they know."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import report_tree, target_tree
from transformers import TrainingArguments

from loraga_dist.artifacts.report import Report
from loraga_dist.publish.text import readme

KEYS = json.loads((Path(__file__).parents[1] / "golden" / "trainer_keys.json").read_text())
OUT = "/data/runs: 1 #/out"
"""A directory that YAML would misread unquoted."""

REPORT = Report.parse(json.dumps(report_tree(config={"output": {"dir": OUT}})))
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
    known = set(KEYS[package]["keys"]) | {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(config) <= known
    assert config["learning_rate"] == 1e-4
    for key, directory in directories.items():
        assert config[key] in (f"{OUT}/{directory}", [f"{OUT}/{directory}"])


def test_learning_rate_ratios_are_known_by_these_names() -> None:
    text = " ".join(readme(REPORT).split())
    for name, packages in {"loraplus_lr_ratio": ("axolotl", "llamafactory"), "lorap_lr_ratio": ("ms_swift",)}.items():
        assert f"`{name}` in" in text
        assert all(name in KEYS[package]["keys"] for package in packages)


def test_what_would_break_markdown_shell_and_python_does_not() -> None:
    evil = 'company/<b>|`x`"\n# end'
    tree = report_tree(
        config={"model": {"name_or_path": evil}, "init": {"scheme": "lora_one"}, "output": {"dir": "a b"}}
    )
    text = readme(Report.parse(json.dumps(tree)))
    assert text.startswith('# LoRA-One start of company/\\<b>\\|\\`x\\`"\\x0a# end\n')
    (line,) = [line for line in text.splitlines() if line.startswith("base = ")]
    call = ast.parse(line).body[0].value
    assert call.args[0].value == evil
    (command,) = [line for line in text.splitlines() if line.startswith("loraga-dist verify")]
    assert shlex.split(command) == ["loraga-dist", "verify", "a b"]


def test_the_table_of_contents_is_what_is_there() -> None:
    for scheme, residual_base, listed, says in (
        ("lora_ga", "full", ["loraga_init", "residual_base", "loraga_offset", "factors"], "wrong by the s B0 A0"),
        ("lora_ga", "none", ["loraga_init", "residual_base", "loraga_offset", "factors"], "materialize-base out"),
        ("pissa", "full", ["loraga_init", "residual_base", "loraga_offset"], "wrong by the s B0 A0"),
        ("lora_one", "full", ["loraga_init", "factors"], "Logits differ by 1e-06, the largest being 3."),
        ("kaiming", "full", ["loraga_init"], "B0 is zero"),
    ):
        config = {"init": {"scheme": scheme}, "output": {"residual_base": residual_base}}
        text = readme(Report.parse(json.dumps(report_tree(config=config))))
        assert re.findall(r"^\| `(\w+)/` \|", text, flags=re.MULTILINE) == listed
        assert says in text and ("materialize-base" in text) == (residual_base == "none")
        assert ("loraga-dist rebuild" in text) == ("factors" in listed)
        assert not re.search(r"\n\n\n|[^\n]\n## |[ \t]\n", text), "blank lines where Markdown wants them"


def test_nothing_is_said_of_experts_where_there_are_none() -> None:
    assert "expert" not in readme(REPORT)


def test_ranks_of_a_budget_are_said() -> None:
    targets = {"t": target_tree(), "u": target_tree(r=5)}
    tree = report_tree(targets=targets, rank_budget={"parameters": 300, "spent": 210})
    assert "Ranks 2 to 5; 210 of 300 parameters spent.\n" in readme(Report.parse(json.dumps(tree)))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "Learning rate: 1.4 times full fine-tuning's"),
        ({"init": {"stable_gamma": 64}, "lora": {"use_rslora": True}}, "Learning rate: 1 times"),
        ({"init": {"scheme": "kaiming"}}, "Learning rate: 8 times full fine-tuning's"),
        ({"init": {"scale": "unit", "stable_gamma": 64.0}}, "Learning rate: none was measured for this start."),
        ({"init": {"scheme": "olora"}}, "Learning rate: none was measured for this start."),
    ],
)
def test_the_learning_rate_follows_from_scheme_gamma_and_scaling(config: dict[str, Any], says: str) -> None:
    report = Report.parse(json.dumps(report_tree(config=config)))
    text = readme(report)
    assert says in text and f"args=SFTConfig(learning_rate={report.learning_rate}, ...)" in text
    assert f"The {report.learning_rate} above is " in text
