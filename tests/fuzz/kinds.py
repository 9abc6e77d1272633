"""What is made wrong: of each kind right input in a directory of its own, a change, and the command that reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from builders import config_tree
from mutations import DEEP, DIGITS, Dice, as_json, as_yaml, change_bytes, change_json, change_tree, neighbour, odd

from loraga_dist.artifacts.names import RESOLVED_CONFIG
from loraga_dist.files.checksums import write_checksums
from loraga_dist.ranks.world import World

RIGHT_OR_REFUSED = frozenset({0, 2})
OR_DAMAGED = frozenset({0, 2, 3})


@dataclass(frozen=True)
class Case:
    """A command on wrong input."""

    arguments: list[str]
    codes: frozenset[int] = RIGHT_OR_REFUSED
    num_lines: int = 1
    """With which it may refuse, at most."""
    makes: tuple[str, ...] = ()
    """What may be in its directory afterwards."""


Inputs = Path
"""The directory of the right inputs: model/, data.jsonl, chats.jsonl, out/, trained/, stopped/."""


def _tree(inputs: Inputs, directory: Path, **sections: Any) -> dict[str, Any]:
    return config_tree(inputs / "model", inputs / "data.jsonl", directory / "out", **sections)


def _every_key(inputs: Inputs, directory: Path) -> dict[str, Any]:
    """A configuration that names all of its keys, as a finished run has written it."""
    tree = yaml.safe_load((inputs / "out" / RESOLVED_CONFIG).read_text())
    return tree | {"output": tree["output"] | {"dir": str(directory / "out")}}


def _init(directory: Path, tree: dict[str, Any], *options: str) -> list[str]:
    (directory / "config.yaml").write_text(yaml.safe_dump(tree))
    return ["init", "--config", str(directory / "config.yaml"), *(options or ("--dry_run",))]


def _copy_model(inputs: Inputs, directory: Path, **sections: Any) -> tuple[Path, list[str]]:
    """A model of the case's own, and the command that reads it."""
    model = directory / "model"
    shutil.copytree(inputs / "model", model)
    return model, _init(directory, _tree(inputs, directory, **sections) | {"model": {"name_or_path": str(model)}})


def _change(path: Path, dice: Dice) -> None:
    path.write_bytes(change_json(path.read_bytes(), dice))


def yaml_file(inputs: Inputs, directory: Path, dice: Dice) -> Case:
    tree = _every_key(inputs, directory)
    for _ in range(dice.choice([1, 1, 1, 2])):
        tree = change_tree(tree, dice)
    content = as_yaml(tree, dice)
    if dice.happens(0.1):
        content = change_bytes(content, dice)
    (directory / "config.yaml").write_bytes(content)
    command = dice.choice([["init", "--dry_run"], ["init", "--dry_run"], ["plan"]])
    return Case([*command, "--config", str(directory / "config.yaml")])


def command_line(inputs: Inputs, directory: Path, dice: Dice) -> Case:
    tree = _every_key(inputs, directory)
    values = {key: value for key, value in tree.items() if not isinstance(value, dict)}
    for section in tree.keys() - values.keys():
        values |= {f"{section}.{key}": value for key, value in tree[section].items()}
    words = _init(directory, _tree(inputs, directory))
    if dice.happens(0.2):
        option = dice.choice(["--ranks", "--gib_per_rank", "--device", "--device_tflops"])
        words = ["plan", *words[1:-1], *dice.choice([["--json"], [option, str(odd(dice)).replace("\0", "")[:99]]])]
    for key in dice.sample(sorted(values), dice.choice([1, 1, 2])):
        value = values[key]
        if dice.happens(0.95):
            value = neighbour(value, dice) if dice.happens(0.7) else odd(dice)
        text = value if isinstance(value, str) else json.dumps(value)
        text = text.replace(DEEP, "[" * 3000).replace(DIGITS, "9" * 5000).replace("\0", "").replace("\ud800", "\udcff")
        words += [f"--{key}", text]
    if dice.happens(0.05):
        words.insert(dice.randrange(1, len(words)), str(dice.choice(["--", "-", "--=", "x", "--lora", "--lora.r="])))
    return Case(words)


def data_lines(inputs: Inputs, directory: Path, dice: Dice) -> Case:
    rows: list[Any] = [json.loads(line) for line in (inputs / dice.choice(["data.jsonl", "chats.jsonl"])).open()]
    for _ in range(dice.choice([1, 1, 2, len(rows)])):
        at = dice.randrange(len(rows))
        rows[at] = change_tree(rows[at], dice)
    content = b"\n".join(as_json(row, dice) for row in rows)
    if dice.happens(0.3):
        content = change_bytes(content, dice)
    if dice.happens(0.1):
        content = content.decode(errors="replace").encode("utf-16")
    name = dice.choice(["csv", "txt", "parquet"]) if dice.happens(0.3) else dice.choice(["jsonl", "json"])
    data = directory / f"data.{name}"
    data.write_bytes(content)
    return Case(_init(directory, _tree(inputs, directory, calibration={"data_files": str(data)})))


def template(inputs: Inputs, directory: Path, dice: Dice) -> Case:
    model, command = _copy_model(inputs, directory, calibration={"data_files": str(inputs / "chats.jsonl")})
    path = model / "chat_template.jinja"
    pieces = [
        "{{ 1 / 0 }}", "{{ nothing.at.all }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% if %}",
        "{{ strftime_now(3) }}", "{{ messages[99] }}", "{{ messages | sum }}", "{{ 'x' * 10**5 }}",
        "{{ raise_exception('\x1b[1m') }}", "{% include 'x' %}", "{{ ''.__class__ }}", "{% generation %}",
        "{{ '%s %s' % 1 }}", "{{ messages | tojson }}", "{% for a in range(10**6) %}{% endfor %}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    ]  # fmt: skip
    content = path.read_bytes()
    at = dice.randrange(len(content))
    if dice.happens(0.6):
        content = content[:at] + dice.choice(pieces).encode() + content[at:]
    else:
        content = change_bytes(content, dice)
    path.write_bytes(content)
    return Case(command)


def weights_header(inputs: Inputs, directory: Path, dice: Dice) -> Case:
    model, command = _copy_model(inputs, directory)
    path = dice.choice(sorted(model.glob("*.safetensors")))
    _change_header(path, dice)
    return Case(command)


def _change_header(path: Path, dice: Dice) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change_json(content[8 : 8 + length], dice)
    said = len(header)
    if dice.happens(0.2):
        said = dice.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(header) - 1])
    path.write_bytes(said.to_bytes(8, "little") + header + content[8 + length :])


def weights_index(inputs: Inputs, directory: Path, dice: Dice) -> Case:
    model, command = _copy_model(inputs, directory)
    _change(model / "model.safetensors.index.json", dice)
    return Case(command)


def model_config(inputs: Inputs, directory: Path, dice: Dice) -> Case:
    model, command = _copy_model(inputs, directory)
    _change(model / dice.choice(["config.json", "config.json", "generation_config.json"]), dice)
    if dice.happens(0.3):
        command[0] = "plan"
        command.remove("--dry_run")
    return Case(command)


def tokenizer_files(inputs: Inputs, directory: Path, dice: Dice) -> Case:
    model, command = _copy_model(inputs, directory)
    _change(model / dice.choice(["tokenizer.json", "tokenizer_config.json"]), dice)
    return Case(command)


def deepspeed_file(inputs: Inputs, directory: Path, dice: Dice) -> Case:
    path = directory / "zero.json"
    offload = {"device": "cpu", "pin_memory": False}
    path.write_text(
        json.dumps(
            {"zero_optimization": {"stage": 3, "offload_param": offload, "reduce_bucket_size": 1000}, "bf16": {}}
        )
    )
    _change(path, dice)
    return Case(_init(directory, _tree(inputs, directory, deepspeed={}) | {"deepspeed": str(path)}))


def finished_output(inputs: Inputs, directory: Path, dice: Dice) -> Case:
    """Report, configuration and adapter JSON, weights' headers and checksums, of an output that a command reads."""
    out, trained, to = directory / "out", directory / "trained", directory / "to"
    shutil.copytree(inputs / "out", out)
    shutil.copytree(inputs / "trained", trained)
    convert = ["convert", "--init", str(out / "loraga_init"), "--trained", str(trained)]
    changed, command, num_lines = dice.choice(
        [
            (out, ["verify", str(out)], 99),
            (out, ["rebuild", str(out), "--to", str(to), "--lora.r", "2"], 1),
            (out, ["materialize-base", str(out), "--to", str(to)], 1),
            (out, [*convert, "--to", str(to)], 1),
            (trained, [*convert, "--merge", str(to)], 1),
        ]
    )
    path = dice.choice(sorted(path for path in changed.rglob("*") if path.suffix in {".json", ".yaml", ".safetensors"}))
    if path.suffix == ".yaml":
        path.write_bytes(as_yaml(change_tree(yaml.safe_load(path.read_text()), dice), dice))
    elif path.suffix == ".safetensors":
        _change_header(path, dice)
    else:
        _change(path, dice)
    if changed == out and dice.random() < 0.5:
        write_checksums(out, World.alone())
    return Case(command, OR_DAMAGED, num_lines, makes=("to",))


def checkpoint(inputs: Inputs, directory: Path, dice: Dice) -> Case:
    """An interrupted run's state, which the same command goes on from."""
    shutil.copytree(inputs / "stopped", directory, dirs_exist_ok=True)
    saved = dice.choice(sorted((directory / ".out.checkpoint").iterdir()))
    path = dice.choice(sorted(path for path in saved.iterdir() if path.suffix in {".json", ".safetensors"}))
    if path.suffix == ".json":
        _change(path, dice)
    else:
        _change_header(path, dice)
    if dice.random() < 0.8:
        write_checksums(saved, World.alone())
    words = ["init", "--config", str(inputs / "stopped.yaml"), "--output.dir", str(directory / "out")]
    return Case(words, OR_DAMAGED, makes=("out", ".out.checkpoint"))


KINDS: dict[str, Callable[[Inputs, Path, Dice], Case]] = {
    "yaml": yaml_file,
    "command line": command_line,
    "data": data_lines,
    "template": template,
    "weights": weights_header,
    "index": weights_index,
    "config.json": model_config,
    "tokenizer": tokenizer_files,
    "deepspeed": deepspeed_file,
    "output": finished_output,
    "checkpoint": checkpoint,
}
