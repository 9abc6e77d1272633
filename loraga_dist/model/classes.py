"""Which class a checkpoint is loaded with: the one that trainers take, or the one that the user names."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from loraga_dist.config import ModelConfig, TaskType
from loraga_dist.errors import UserError

AUTO_CLASSES: dict[TaskType, tuple[str, ...]] = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM",),
    "SEQ_CLS": ("AutoModelForSequenceClassification",),
}
"""What transformers loads a model for a task with."""


class FoundClass(NamedTuple):
    """What loads a checkpoint."""

    model_class: type[nn.Module]
    config: Any
    """Of this class: of a checkpoint with towers it may be the language model's part."""
    class_name: str | None
    """As `model.class`; None where nobody has to say it."""


def find_class(config: ModelConfig, hf_config: Any, task_type: TaskType, directory: Path) -> FoundClass:
    """Find `model.class`, or what config.json names as TRL does, or what transformers has for the task.

    Raises UserError where that does not load this model for the task.
    """
    names = AUTO_CLASSES[task_type]
    remote = (getattr(hf_config, "auto_map", None) or {}) if config.trust_remote_code else {}
    # of several, TRL takes the most specific
    name = next((name for name in reversed(names) if name in remote and config.class_name in (None, name)), None)
    if name is not None:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        model_class = get_class_from_dynamic_module(remote[name], str(directory))
        return FoundClass(model_class, hf_config, config.class_name or (None if name == names[0] else name))
    classes = _classes(hf_config, task_type)
    if not classes:
        raise UserError("lora.task_type", task_type, _another_task(hf_config, task_type))
    wanted = config.class_name
    if wanted is not None and wanted not in classes:
        problem = f"is no class for {type(hf_config).__name__} and {task_type}; write one of {', '.join(classes)}"
        raise UserError("model.class", wanted, problem)
    stated = getattr(hf_config, "architectures", None) or [""]
    model_class = classes.get(wanted or stated[0]) or next(iter(classes.values()))
    if model_class not in _mapped(names[0], hf_config)[:1]:
        wanted = model_class.__name__
    text, own = hf_config.get_text_config(), model_class.config_class
    # families that share a class have configs of their own, which it takes as well
    is_narrow = not isinstance(hf_config, own) and isinstance(text, own)
    return FoundClass(model_class, text if is_narrow else hf_config, wanted)


def loader_of(config: ModelConfig, task_type: TaskType) -> str:
    """What to import from transformers to load the model; `model.class` as resolved."""
    return config.class_name or AUTO_CLASSES[task_type][0]


def _classes(hf_config: Any, task_type: TaskType) -> dict[str, Any]:
    """The classes that transformers has for a task and this config, by name; the usual one first."""
    names = AUTO_CLASSES[task_type]
    if hf_config.is_encoder_decoder:
        names = names[:1]  # what reads images and is one is no causal model
    elif task_type == "SEQ_2_SEQ_LM":
        names = ()  # what transformers lists there are decoders that hear
    found = [found for name in names for found in _mapped(name, hf_config)]
    if task_type == "CAUSAL_LM" and not found:
        found = _text_model_alone(hf_config)
    return {each.__name__: each for each in found}


def _text_model_alone(hf_config: Any) -> list[Any]:
    """What config.json names, of a text model that transformers loads as a part of others only."""
    import transformers

    found = [getattr(transformers, name, None) for name in hf_config.architectures or ()]
    causal = [each for each in found if each is not None and each.__name__.endswith("ForCausalLM")]
    return [each for each in causal if isinstance(hf_config, each.config_class)]


def _mapped(auto: str, hf_config: Any) -> list[Any]:
    import transformers

    mapping = getattr(transformers, auto)._model_mapping
    found = mapping.get(type(hf_config), ())
    return list(found) if isinstance(found, tuple | list) else [found]


def _another_task(hf_config: Any, task_type: TaskType) -> str:
    others = [task for task in AUTO_CLASSES if task != task_type and _classes(hf_config, task)]
    instead = f"write {' or '.join(others)}" if others else "write a model that has one"
    name, autos = type(hf_config).__name__, AUTO_CLASSES[task_type]
    if any(_mapped(auto, hf_config) for auto in autos):  # by transformers, for what it is not
        kind = "an encoder and a decoder" if hf_config.is_encoder_decoder else "a decoder alone"
        return f"{name} is of {kind}; {instead}"
    return f"{name} has no {' or '.join(autos)}; {instead}"


def names_in_forward(model_class: type[nn.Module]) -> tuple[str, ...]:
    """Names of attributes that its forward reads."""
    code = getattr(inspect.unwrap(model_class.forward), "__code__", None)
    return () if code is None else code.co_names
