"""Gradient engines: (x, dy) of a group of targets -> the leading singular triplets of their mean gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loraga_dist.engines import exact, sketch
from loraga_dist.engines.base import GradientEngine, GradientSVD, Matrix
from loraga_dist.engines.exact import ExactEngine
from loraga_dist.engines.home import StateHome
from loraga_dist.engines.sketch import SketchEngine


@dataclass(frozen=True, kw_only=True)
class EngineKind:
    """An engine, and what the plan must know of it before it exists."""

    engine: type[ExactEngine] | type[SketchEngine]
    width: Callable[[int, int, int, int | None], int]
    state_bytes: Callable[[int, int, int], int]
    refines: bool


ENGINES = {
    "exact": EngineKind(engine=ExactEngine, width=exact.width, state_bytes=exact.state_bytes, refines=False),
    "sketch": EngineKind(engine=SketchEngine, width=sketch.width, state_bytes=sketch.state_bytes, refines=True),
}

__all__ = [
    "ENGINES",
    "EngineKind",
    "ExactEngine",
    "GradientEngine",
    "GradientSVD",
    "Matrix",
    "SketchEngine",
    "StateHome",
]
