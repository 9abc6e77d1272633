"""Gradient engines: (x, dy) of a group of targets -> the leading singular triplets of their mean gradients."""

from loraga_dist.engines.base import GradientEngine, GradientSVD, Matrix
from loraga_dist.engines.exact import ExactEngine

ENGINES: dict[str, type[ExactEngine]] = {"exact": ExactEngine}

__all__ = ["ENGINES", "ExactEngine", "GradientEngine", "GradientSVD", "Matrix"]
