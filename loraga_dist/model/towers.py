"""What lies beside the language model in a model that also reads images or sound."""

from __future__ import annotations

from typing import Any

from torch import nn


def text_model(model: nn.Module) -> str:
    """The name of the language model in a model of more; empty where it is all there is."""
    config: Any = getattr(model, "config", None)
    if config is None or config.is_encoder_decoder or config.get_text_config() is config:
        return ""
    decoder = model.get_decoder()  # type: ignore[operator]
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    head = model.get_output_embeddings()  # type: ignore[operator]
    while name:  # a language model may stand there with its output head
        outer, _, own = name.rpartition(".")
        beside = (child for key, child in model.get_submodule(outer).named_children() if key != own)
        if any(child is not head and next(child.parameters(), None) is not None for child in beside):
            break
        name = outer
    return name


def tower_of(name: str, text: str) -> str | None:
    """The module beside the language model `text` that a module or parameter belongs to: a tower, or what leads from
    one into the language model."""
    outer = text.rpartition(".")[0]
    prefix = f"{outer}." if outer else ""
    if not text or f"{name}.".startswith(f"{text}.") or not name.startswith(prefix):
        return None
    return prefix + name.removeprefix(prefix).partition(".")[0]
