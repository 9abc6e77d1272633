"""The engines of one group as one: every matrix goes to its own kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from loraga_dist.engines import ENGINES
from loraga_dist.engines.base import (
    Collectives,
    EngineState,
    GradientEngine,
    GradientSVD,
    Matrix,
    RefiningEngine,
    Tensors,
)
from loraga_dist.engines.home import StateHome


@dataclass(frozen=True)
class EngineGroup:
    """A `GradientEngine` made of others, each for its own matrices."""

    engines: dict[str, GradientEngine]
    """By the name that ENGINES has for their kind."""
    engine_of: dict[str, GradientEngine]
    """By the name of the matrix."""

    @classmethod
    def of(cls, matrices: Sequence[Matrix], *, home: StateHome, seed: int, dtype: torch.dtype) -> EngineGroup:
        """dtype: of the data the engines will see."""
        engines = {}
        for name in dict.fromkeys(matrix.engine for matrix in matrices):
            members = [matrix for matrix in matrices if matrix.engine == name]
            engines[name] = ENGINES[name](members, home=home, seed=seed, dtype=dtype)
        return cls(engines, {matrix.name: engines[matrix.engine] for matrix in matrices})

    @property
    def names(self) -> list[str]:
        """Of the matrices."""
        return list(self.engine_of)

    @property
    def refining(self) -> EngineGroup | None:
        """Those to which further passes over the same data bring something, if there are any."""
        engines = {name: engine for name, engine in self.engines.items() if ENGINES[name].refines}
        members = {name: engine for name, engine in self.engine_of.items() if engine in engines.values()}
        return EngineGroup(engines, members) if engines else None

    def begin_refinement(self, world: Collectives) -> None:
        """Before each further pass; a collective, of a group that is `refining`."""
        for engine in self.engines.values():
            cast(RefiningEngine, engine).begin_refinement(world)

    def begin_microbatch(self, index: int) -> None:
        for engine in self.engines.values():
            engine.begin_microbatch(index)

    def observe(self, name: str, x_TN: torch.Tensor, dy_TM: torch.Tensor) -> None:
        self.engine_of[name].observe(name, x_TN, dy_TM)

    def end_microbatch(self, world: Collectives) -> None:
        for engine in self.engines.values():
            engine.end_microbatch(world)

    def split_half_cosines(self, world: Collectives) -> list[float | None]:
        return [cosine for engine in self.engines.values() for cosine in engine.split_half_cosines(world)]

    def save_state(self, world: Collectives) -> EngineState:
        states = [engine.save_state(world) for engine in self.engines.values()]
        tensors = {name: tensor for state in states for name, tensor in state.tensors.items()}
        return EngineState({"engines": [state.content for state in states]}, tensors)

    def load_state(self, content: dict[str, Any], tensors: Tensors, world: Collectives) -> None:
        for engine, of_engine in zip(self.engines.values(), content["engines"], strict=True):
            engine.load_state(of_engine, tensors, world)

    def factorize(self, world: Collectives, num_tokens: int) -> Iterator[tuple[str, GradientSVD]]:
        for engine in self.engines.values():
            yield from engine.factorize(world, num_tokens)
