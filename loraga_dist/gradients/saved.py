"""Whether a saved state is one that calibration can go on from: every count and every tensor, before any is used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch
from pydantic import FiniteFloat, TypeAdapter

from loraga_dist.engines.base import Matrix, require_entries
from loraga_dist.engines.group import EngineGroup
from loraga_dist.files.checkpoint import Checkpoint
from loraga_dist.files.stored_tensors import entries_of
from loraga_dist.gradients.gradients import DataUsed, GradientFacts
from loraga_dist.gradients.observer import LossTotals
from loraga_dist.gradients.passes import Position

Kind = TypeVar("Kind")


def require_finished(part: Checkpoint, group: Sequence[Matrix]) -> None:
    """Raise an exception, ValueError for most, unless this holds the results of that group of the plan."""
    found = {name: _typed(GradientFacts, content) for name, content in part.content["facts"].items()}
    if found.keys() != {matrix.name for matrix in group}:
        raise ValueError("its targets are not those of the group")
    _used(part.content["data"])
    _require_seconds(part)
    saved = entries_of(part.tensors.slots)
    for matrix in group:
        M, N, K = matrix.M, matrix.N, matrix.num_kept
        shapes = {"U_MK": (M, K), "S_K": (K,), "Vh_KN": (K, N)}
        require_entries(saved, {f"{matrix.name}.{name}": (torch.float32, shape) for name, shape in shapes.items()})


def require_state(state: Checkpoint, groups: Sequence[Sequence[Matrix]], num_finished: int) -> None:
    """The same unless it is a state within the group of the plan that follows so many finished ones."""
    content: dict[str, Any] = state.content["position"]
    position, used = _typed(Position, content), _used(state.content["data"])
    _typed(LossTotals, content["totals"])
    _require_seconds(state)
    if position.group != num_finished or not 0 <= position.num_samples <= used.num_samples:
        raise ValueError(f"its position is {content}")
    if min(position.refinement, position.num_microbatches, position.totals.num_tokens, position.totals.num_terms) < 0:
        raise ValueError(f"its position is {content}")
    end = position.group + position.num_groups
    if not 0 <= position.num_groups_ahead < position.num_groups or end > len(groups):
        raise ValueError(f"its position is {content}")
    if position.num_groups_ahead and not position.num_samples < position.chunk_end <= used.num_samples:
        raise ValueError(f"its position is {content}")
    saved = entries_of(state.tensors.slots)
    of_groups = zip(groups[position.group : end], state.content["engines"], strict=True)
    for group, engines in of_groups:
        EngineGroup.check_state(group, engines, saved)


def _require_seconds(saved: Checkpoint) -> None:
    TypeAdapter(dict[str, FiniteFloat]).validate_json(json.dumps(saved.content["seconds"]), strict=True)


def _used(content: Any) -> DataUsed:
    used = _typed(DataUsed, content)
    if min(used.num_samples - 1, used.num_supervised_tokens, used.num_terms, used.refine_passes) < 0:
        raise ValueError(f"the data it has used is {content}")
    return used


def _typed(kind: type[Kind], content: dict[str, Any]) -> Kind:
    """The dataclass that was written as this JSON: all its fields, none beside them, of their types."""
    if content.keys() != {field.name for field in fields(kind)}:  # type: ignore[arg-type]
        raise ValueError(f"it has other keys than {kind.__name__}")
    return TypeAdapter(kind).validate_json(json.dumps(content), strict=True)
