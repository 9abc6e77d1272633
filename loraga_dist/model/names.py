"""Names that the user wrote, held against the model's: PEFT passes over those that match nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from loraga_dist.config import LoraSection
from loraga_dist.errors import UserError

_MOST_LISTED = 40
"""A message stays one that is read."""


def require_matches(model: nn.Module, lora: LoraSection, *, for_experts: str | None = None) -> None:
    """Raise UserError for a module's name, pattern or a layer's number that matches nothing in the model.

    for_experts: what to write for experts that are parameters; None where there are none.
    """
    modules = [name for name, _ in model.named_modules() if name]
    matrices = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    instead = "all-linear"
    if for_experts:
        instead += f"; experts of this model are parameters: for them write {for_experts}"
    wanted = None if lora.target_modules == "all-linear" else lora.target_modules
    _require_each("lora.target_modules", wanted, modules, matrices, instead)
    _require_each("lora.exclude_modules", lora.exclude_modules, modules, matrices, "leave it out")
    _require_each("lora.modules_to_save", lora.modules_to_save, modules, modules, "leave it out")
    chosen = lora.layers_to_transform
    # the first in a name is a layer's, further ones may be of experts
    found = (re.search(r"\.(\d+)\.", name) for name in modules)
    numbers = sorted({int(match[1]) for match in found if match})
    instead = f"write numbers from {numbers[0]} to {numbers[-1]}" if numbers else "leave it out"
    if chosen == []:  # which PEFT takes for all
        raise UserError("lora.layers_to_transform", chosen, f"names no layer; {instead}")
    for number in [chosen] if isinstance(chosen, int) else chosen or ():
        if number not in numbers:
            raise UserError("lora.layers_to_transform", number, f"matches no layer; {instead}")
    if chosen is not None and isinstance(lora.target_modules, str):
        problem = "chooses among names, and lora.target_modules has none"
        raise UserError(
            "lora.layers_to_transform", chosen, f"{problem}; write names there ({_kinds(matrices or modules)})"
        )


def with_end(names: Iterable[str], end: str) -> list[str]:
    """As PEFT matches them."""
    return [name for name in names if f".{name}".endswith(f".{end}")]


def is_excluded(module: str, lora: LoraSection) -> bool:
    """Whether the user leaves a module out, as PEFT matches it."""
    excluded = lora.exclude_modules or []
    if isinstance(excluded, str):
        return re.fullmatch(excluded, module) is not None
    return any(with_end([module], end) for end in excluded)


def is_named(parameter: str, lora: LoraSection) -> bool:
    """Whether the user asks for this parameter by its own name."""
    return any(with_end([parameter], end) for end in lora.target_parameters or ())


def excluding(lora: LoraSection, pattern: str) -> str:
    """What to write, whole, to leave out what this regular expression matches, too."""
    own = lora.exclude_modules or []
    others = [own] if isinstance(own, str) else [rf"(.*\.)?{re.escape(end)}" for end in own]
    return f"write lora.exclude_modules: {'|'.join([*others, pattern])}"


def pattern_of(names: Iterable[str], *, any_layer: bool = False) -> str:
    """A regular expression of these whole names. any_layer: with any number inside them in place of each."""
    split = []
    for name in names:
        *outer, last = map(re.escape, name.split("."))
        split.append([*(r"\d+" if any_layer and part.isdecimal() else part for part in outer), last])
    return _pattern(split)


def to_leave_out(names: Sequence[str], lora: LoraSection, others: str | None = None) -> tuple[str, Any, str]:
    """The key and value that chose these modules, or parameters that the user named, and what to write to leave all
    of them out. others: a regular expression of the modules and more."""
    modules = [name for name in names if not is_named(name, lora)]
    ends = [end for end in lora.target_parameters or () if with_end(names, end)]
    instead = [f"leave {', '.join(ends)} out of lora.target_parameters"] if ends else []
    if not modules:
        return "lora.target_parameters", lora.target_parameters, instead[0]
    instead.append(excluding(lora, others or pattern_of(modules)))
    return "lora.target_modules", lora.target_modules, "; ".join(instead)


def must_be_excluded(names: Sequence[str], what: str, lora: LoraSection) -> UserError:
    """What to raise over targets that are `what`: modules, or parameters that the user named."""
    key, value, instead = to_leave_out(names, lora)
    return UserError(key, value, f"{names[0]} is among the targets that are {what}; {instead}")


def _pattern(names: Iterable[Sequence[str]]) -> str:
    ends: dict[str, list[Sequence[str]]] = {}
    for first, *rest in names:
        ends.setdefault(first, []).append(rest)
    firsts: dict[str, list[str]] = {}
    for first, rests in ends.items():
        inner = [rest for rest in rests if rest]
        end = rf"\.{_pattern(inner)}" if inner else ""
        firsts.setdefault(f"({end})?" if inner and len(inner) < len(rests) else end, []).append(first)
    leaves = firsts.pop("", [])
    return _one_of([*leaves, *(_one_of(these) + end for end, these in firsts.items())])


def _one_of(patterns: Sequence[str]) -> str:
    return patterns[0] if len(patterns) == 1 else f"({'|'.join(patterns)})"


def _require_each(
    key: str, wanted: str | Sequence[str] | None, modules: Sequence[str], usual: Sequence[str], instead: str
) -> None:
    """wanted: a regular expression or ends of names. usual: what somebody would name there."""
    if wanted is None:
        return
    if isinstance(wanted, str):
        if not any(re.fullmatch(wanted, name) for name in modules):
            raise UserError(key, wanted, f"matches no module's whole name, as {usual[0] if usual else modules[0]}")
        return
    for end in wanted:
        if not with_end(modules, end):
            raise UserError(key, end, f"matches no module; {_nearest(end, usual or modules)}{instead}")


def _nearest(end: str, names: Sequence[str]) -> str:
    """What to write instead, up to the last choice."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    near = difflib.get_close_matches(end.rpartition(".")[2], kinds)
    if near:
        return f"did you mean {' or '.join(near)}? Write that, or "
    return f"write names the model has ({_kinds(names)}), or "


def _kinds(names: Iterable[str]) -> str:
    """The last parts of names, each once."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return ", ".join(kinds[:_MOST_LISTED]) + (", ..." if len(kinds) > _MOST_LISTED else "")
