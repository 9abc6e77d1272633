"""A user's YAML file and dotted command-line overrides as plain values; what they mean is `config.py`'s."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from loraga_dist.errors import UserError, blame

MOST_VALUES, DEEPEST = 100_000, 100
"""In one section of a configuration; aliases can write 10**9 values in a few lines, or one that holds itself."""


def read_tree(path: str | Path, overrides: Iterable[str]) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, and apply `--section.key value` (or `--section.key=value`) overrides."""
    with blame("--config", str(path), "cannot be read", "write the path of a YAML file"):
        content = Path(path).read_bytes()
    with blame("--config", str(path), "is not YAML", "write sections such as 'model:' with 'key: value' below"):
        tree = yaml.load(content.decode(), Loader=_Loader)
    if not isinstance(tree, dict):
        raise UserError("--config", str(path), "must hold sections such as 'model:' and 'lora:'")
    _apply_overrides(tree, overrides)
    return tree


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one section: the last would win in silence."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        # as it is written: what `<<` brings in stands behind what it is merged into
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ValueError(f"{key.value} stands there twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would read as numbers."""


for _kind in (_Loader, _Dumper):  # YAML 1.1, which PyYAML knows, has numbers such as 1e-2 with a dot alone
    _exponential = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _exponential, list("-+.0123456789"))


def dump(tree: dict[str, Any]) -> str:
    """Write a tree as the YAML that `read_tree` reads it from."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def require_plain(section: str, tree: Any) -> None:
    """Raise UserError for text that no file or file name can hold, and for what has no end."""
    num_values, left = 0, [(tree, 0)]
    while left:
        value, depth = left.pop()
        num_values += 1
        if num_values > MOST_VALUES or depth > DEEPEST:
            problem = f"holds more than {MOST_VALUES} values or {DEEPEST} levels; write what its keys are for"
            raise UserError(section, f"<{type(tree).__name__}>", problem)
        if isinstance(value, str):
            if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
                raise UserError(section, value, "holds a character that is none (NUL, or not UTF-8); write UTF-8")
        elif isinstance(value, dict):
            left += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list | tuple | set):
            left += [(part, depth + 1) for part in value]


def _apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> None:
    words = list(overrides)
    while words:
        word = words.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise UserError("command line", word, "is not understood; overrides are written --section.key value")
        if not equals:
            if not words:
                raise UserError(f"--{key}", None, "has no value; write --section.key value")
            text = words.pop(0)
        with blame(f"--{key}", text, "is not understood", "write a number, a word, or [...] or {...} in YAML"):
            try:
                value = yaml.load(text, Loader=_Loader)
            except yaml.YAMLError:
                value = text
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise UserError(f"--{key}", text, f"{parent} is not a section")
        node[leaf] = value
