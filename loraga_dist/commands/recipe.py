"""A configuration to copy: every key with its default and its meaning, the few that most runs change first."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from loraga_dist.config import FILL_IN, InitConfig, keys_of, sections_of
from loraga_dist.schemes import SCHEMES

_TO_FILL_IN = ("model.name_or_path", "calibration.data_files", "output.dir")
_SHOWN = (
    "model.dtype",
    "lora.r",
    "lora.lora_alpha",
    "lora.target_modules",
    "init.scheme",
    "gradient.engine",
    "gradient.state_budget_gib",
    "calibration.max_length",
    "calibration.max_samples",
    "calibration.per_device_batch_size",
)
"""What most runs change; the other keys are commented out."""

_HEAD = f"""\
# A start with every setting at its default. Write your own in place of {FILL_IN}, then:
#
#   loraga-dist plan --config my.yaml --ranks 8          what it takes, from the checkpoint's headers alone
#   torchrun --standalone --nproc_per_node 8 launch/init.py --config my.yaml
#
# Settings are commented out with one #, without a space.
"""
_WIDTH = 100

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
    "calibration.per_device_batch_size": "Sequences, or pairs of preference data, in a microbatch of one rank.",
    "calibration.assistant_only_loss": "Chats: loss on the assistant's turns alone.",
    # entries of the tables in schemes.py
    "init.stable_gamma": "null is the scheme's own: "
    + ", ".join(f"{it.stable_gamma:g} for `{name}`" for name, it in SCHEMES.items() if "stable_gamma" in it.init_keys)
    + ".",
    "init.direction": "How A and B share out the 2r leading directions: A the first r and B the others (`ArB2r`), the "
    "reverse (`A2rBr`), in turns (`ArBr`), or by lot (`random`).",
    "init.scale": "What unit vectors are multiplied by in A and B: M^(1/4) / sqrt(gamma) (`stable`, the paper's), 1 "
    "(`unit`), 1 / s (`gd`), the mean of the roots of W's r leading singular values over s (`weight_svd`); or in B "
    "alone, by `stable` times the gradient's singular values (`peft`, as PEFT does).",
}
"""Of keys whose meaning is not the configuration's own."""


def meaning(key: str, field: FieldInfo) -> str:
    """What a key (`section.name`) decides, in one line. Raises ValueError unless it is said in exactly one place."""
    (found,) = filter(None, (field.description, MEANINGS.get(key)))
    return " ".join(found.split())


def as_yaml(value: Any) -> str:
    """A value on one line."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def recipe() -> str:
    """The text of a configuration that is right once its `FILL_IN`s are filled in."""
    to_fill_in = {key.partition(".")[0] for key in _TO_FILL_IN}
    ordered = sorted(sections_of(InitConfig).items(), key=lambda section: section[0] not in to_fill_in)
    parts = [[f"{name}:", *_keys(kind, f"{name}.")] for name, kind in ordered]
    return "\n".join([_HEAD, *("\n".join([*part, ""]) for part in parts), *_keys(InitConfig), ""])


def _keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The lines of a section's own keys, those to fill in first and those commented out last."""
    fields = keys_of(kind)
    names = [name for name in fields if name not in sections_of(InitConfig)] if not prefix else list(fields)
    for name in sorted(names, key=lambda name: (prefix + name not in _TO_FILL_IN, prefix + name not in _SHOWN)):
        key, field, indent = prefix + name, fields[name], "  " if prefix else ""
        yield from (f"{indent}# {line}" for line in textwrap.wrap(meaning(key, field), _WIDTH))
        value = FILL_IN if key in _TO_FILL_IN else as_yaml(field.default)
        yield f"{indent}{'' if key in _TO_FILL_IN + _SHOWN else '#'}{name}: {value}"
