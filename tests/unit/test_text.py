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


def with_values(config: dict[str, Any], **values: Any) -> Report:
    return Report.parse(json.dumps(report_tree(config=config, **values)))


def known_and_written(report: Report) -> dict[str, dict[str, Any]]:
    """What every trainer's lines say, all of it keys that it knows."""
    blocks = re.findall(r"^(\S+):\n\n```yaml\n(.*?)```", readme(report), flags=re.MULTILINE | re.DOTALL)
    found = {trainer: yaml.safe_load(block) for trainer, block in blocks}
    for trainer, lines in found.items():
        package, _ = EXPECTED[trainer]
        known = set(KEYS[package]["keys"]) | {field.name for field in dataclasses.fields(TrainingArguments)}
        assert set(lines) <= known
    return found


def test_a_pinned_base_with_code_of_its_own_is_named_so_everywhere() -> None:
    model = {"name_or_path": "company/base", "revision": "abc", "trust_remote_code": True}
    report = with_values({"model": model, "init": {"scheme": "rrr"}})
    assert 'from_pretrained("company/base", revision="abc", trust_remote_code=True, dtype="auto")' in readme(report)
    lines = known_and_written(report)
    assert lines["Axolotl"]["revision_of_model"] == lines["LLaMA-Factory"]["model_revision"] == "abc"
    assert lines["ms-swift"]["model_revision"] == "abc"
    assert lines["Axolotl"]["trust_remote_code"] and lines["LLaMA-Factory"]["trust_remote_code"]
    residual = readme(with_values({"model": model}))
    assert 'residual_base", trust_remote_code=True, dtype="auto")' in residual and "abc" not in residual


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "compressed-tensors", "bitsandbytes"])
def test_a_quantized_base_is_dequantized_where_adapters_on_it_are_not_trained(method: str) -> None:
    report = with_values({"init": {"scheme": "rrr"}}, base_quantization=method)
    text, lines = readme(report), known_and_written(report)
    assert "--merge" not in text, "convert refuses it"
    (program,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (names,) = [line for line in program.splitlines() if line.startswith("from transformers import ")]
    namespace: dict[str, Any] = {}
    exec(names, namespace)
    if method == "bitsandbytes":
        assert "quantization_config" not in text and len(lines) == 3
        return
    (call,) = re.findall(r"quantization_config=(\w+\(dequantize=True\))", program)
    assert eval(call, namespace).quant_method == method and eval(call, namespace).dequantize
    assert lines == {"Axolotl": lines["Axolotl"]}, "the others have no key for it"
    assert lines["Axolotl"]["model_quantization_config"] == type(eval(call, namespace)).__name__


def test_trainers_are_those_of_the_task_and_the_loss() -> None:
    for task in ("SEQ_2_SEQ_LM", "SEQ_CLS"):
        text = readme(with_values({"lora": {"task_type": task}}))
        assert "TRL:" not in text and "```yaml" not in text and "transformers' `Trainer` takes this model" in text
    for loss, trainer in (("cross_entropy", "SFT"), ("dpo", "DPO"), ("policy_gradient", "GRPO")):
        assert f"`{trainer}Trainer(model=model, peft_config=None, args={trainer}Config(" in readme(
            with_values({}, loss=loss)
        )


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
