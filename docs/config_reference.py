"""docs/CONFIG.md: every key of the configuration, from the model in loraga_dist/config.py.

usage: python docs/config_reference.py > docs/CONFIG.md
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from loraga_dist.commands.recipe import as_yaml, meaning
from loraga_dist.config import InitConfig, keys_of, sections_of

INTRODUCTION = """\
# Configuration

Every key of a run's YAML file. Written by `python docs/config_reference.py` from
[`loraga_dist/config.py`](../loraga_dist/config.py), where each default stands once.

- Any key can also be given on the command line, as `--section.key value`; the value is read as YAML.
- An unknown key is an error that names the nearest known one, and so is a value of another type.
- Paths may start with `~`. They are kept as absolute ones, with the commit of a hub's model, in `resolved_config.yaml`
  of the output directory, which is the same run from any directory.
- `loraga_dist.initialize` takes the sections `lora`, `init` and `gradient` and the key `deepspeed`; model and data are
  its arguments.
- `loraga-dist config` prints a file to fill in, with all of these at their defaults. `configs/` has one for the
  quickstart and one for each of the recipes of [PLANS.md](PLANS.md).
"""


def reference() -> str:
    """The document."""
    sections = sections_of(InitConfig)
    tables = [
        _table(name, kind, f"{kind.__doc__} {InitConfig.model_fields[name].description or ''}", prefix=f"{name}.")
        for name, kind in sections.items()
    ]
    return "\n".join([INTRODUCTION, *tables, _table("Beside the sections", InitConfig, "", leave_out=sections)])


def _table(title: str, kind: type[BaseModel], about: str, prefix: str = "", leave_out: Collection[str] = ()) -> str:
    keys, fields = kind.model_json_schema()["properties"], keys_of(kind)
    rows = [_row(prefix + name, fields[name], keys[name]) for name in keys if name not in leave_out]
    text = [" ".join(about.split()), ""] if about else []
    return "\n".join([f"## {title}", "", *text, "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _row(name: str, field: FieldInfo, key: dict[str, Any]) -> str:
    default = "required" if field.is_required() else f"`{as_yaml(field.default)}`"
    return f"| `{name}` | {_type(key, field.metadata)} | {default} | {meaning(name, field)} |"


def _type(key: dict[str, Any], annotations: Iterable[Any] = ()) -> str:
    """A JSON schema's type in words. annotations: of the field, of which one may list the names of a table."""
    for annotation in annotations:
        if hasattr(annotation, "choices"):
            key = {"enum": annotation.choices}
    if "anyOf" in key:
        names = list(dict.fromkeys(_type(member) for member in key["anyOf"]))
        if "number" in names and "integer" in names:
            names.remove("integer")
        return " or ".join(names) + _limits(key)
    if "enum" in key or "const" in key:
        return " or ".join(f"`{as_yaml(value)}`" for value in key.get("enum", [key.get("const")]))
    if key["type"] == "array":
        return f"list of {_type(key['items'])}"
    if key["type"] == "object":
        values = key["additionalProperties"]
        return f"mapping to {_type(values)}" if isinstance(values, dict) else "mapping"
    return key["type"] + _limits(key)


def _limits(key: dict[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "gt": ">", "exclusiveMaximum": "<"}
    limits = [f"{sign} {key[name]:g}" for name, sign in signs.items() if name in key]
    return " " + ", ".join(limits) if limits else ""


if __name__ == "__main__":
    print(reference(), end="")
