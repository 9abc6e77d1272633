"""Gradient engines: (x, dy) of a group of targets -> the leading singular triplets of their mean gradients."""

from __future__ import annotations

from loraga_dist.engines.base import USUAL_AMOUNT, Amount, GradientEngine, GradientSVD, Matrix
from loraga_dist.engines.exact import ExactEngine
from loraga_dist.engines.home import StateHome
from loraga_dist.engines.sketch import SketchEngine

ENGINES: dict[str, type[GradientEngine]] = {"sketch": SketchEngine, "exact": ExactEngine}
"""By the name that `gradient.engine` has for it. `auto` takes the one of the least cost that suits a matrix."""

__all__ = [
    "ENGINES",
    "USUAL_AMOUNT",
    "Amount",
    "ExactEngine",
    "GradientEngine",
    "GradientSVD",
    "Matrix",
    "SketchEngine",
    "StateHome",
]
