"""docs/CONFIG.md: every key of the configuration, from the model in loraga_dist/config.py.

usage: python docs/config_reference.py > docs/CONFIG.md
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from loraga_dist.config import InitConfig

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
- `configs/` has a file for the quickstart and one for each of the recipes of [PLANS.md](PLANS.md).
"""

MEANINGS = {
    # as PEFT has them
    "lora.r": "Rank of A and B.",
    "lora.lora_alpha": "The scaling is s = `lora_alpha / r`.",
    "lora.use_rslora": "The scaling is s = `lora_alpha / sqrt(r)`.",
    "lora.target_modules": "Names or ends of names, a regular expression, or `all-linear`: all but the output head.",
    "lora.exclude_modules": "Left out of `target_modules`; names, ends of names or a regular expression.",
    "lora.rank_pattern": "Other ranks, by the end of a name or a regular expression.",
    "lora.alpha_pattern": "Other alphas, by the end of a name or a regular expression.",
    "lora.modules_to_save": "Modules that train as a whole and are saved with the adapter; classifiers add their head.",
    "lora.layers_to_transform": "Numbers of the layers that get an adapter; null is all.",
    "lora.layers_pattern": "Name of the model's list of layers, where PEFT does not know it.",
    "lora.task_type": "Decides the model class, the format of the data and the loss.",
    # as transformers has them
    "model.revision": "Branch, tag or commit on the hub.",
    "model.attn_implementation": "`eager`, `sdpa`, ...; null is transformers' own choice.",
    "model.trust_remote_code": "Run the code that lies beside the checkpoint.",
    # as datasets and TRL have them
    "calibration.dataset_config": "Name of the dataset's configuration.",
    "calibration.data_files": "Files, patterns or URLs.",
    "calibration.split": "Split of the dataset; slices such as `train[:10%]`, too.",
    "calibration.dataset_text_field": "The column with plain text.",
    "calibration.per_device_batch_size": "Sequences in a microbatch of one rank.",
    "calibration.assistant_only_loss": "Chats: loss on the assistant's turns alone.",
    # entries of the tables in schemes.py
    "init.direction": "How A and B share out the 2r leading directions: A the first r and B the others (`ArB2r`), the "
    "reverse (`A2rBr`), in turns (`ArBr`), or by lot (`random`).",
    "init.scale": "What unit vectors are multiplied by in A and B: M^(1/4) / sqrt(gamma) (`stable`, the paper's), 1 "
    "(`unit`), 1 / s (`gd`), the mean of the roots of W's r leading singular values over s (`weight_svd`); or in B "
    "alone, by `stable` times the gradient's singular values (`peft`, as PEFT does).",
}
"""Of keys whose meaning is not the configuration's own."""


def reference() -> str:
    """The document."""
    kinds = {name: field.annotation for name, field in InitConfig.model_fields.items()}
    sections = {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}
    tables = [
        _table(name, kind, f"{kind.__doc__} {InitConfig.model_fields[name].description or ''}", prefix=f"{name}.")
        for name, kind in sections.items()
    ]
    return "\n".join([INTRODUCTION, *tables, _table("Beside the sections", InitConfig, "", leave_out=sections)])


def _table(title: str, kind: type[BaseModel], about: str, prefix: str = "", leave_out: Collection[str] = ()) -> str:
    keys = kind.model_json_schema()["properties"]
    rows = [_row(prefix + name, kind.model_fields[name], keys[name]) for name in keys if name not in leave_out]
    text = [" ".join(about.split()), ""] if about else []
    return "\n".join([f"## {title}", "", *text, "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _row(name: str, field: FieldInfo, key: dict[str, Any]) -> str:
    default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
    (meaning,) = filter(None, (field.description, MEANINGS.get(name)))  # exactly one of them
    return f"| `{name}` | {_type(key, field.metadata)} | {default} | {' '.join(meaning.split())} |"


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
        return " or ".join(f"`{_yaml(value)}`" for value in key.get("enum", [key.get("const")]))
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


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


if __name__ == "__main__":
    print(reference(), end="")
