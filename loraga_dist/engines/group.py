"""The engines of one sweep as one: every matrix goes to its own kind."""

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
    """A `GradientEngine` made of others, by the name of the matrix."""

    engines: list[GradientEngine]
    engine_of: dict[str, GradientEngine]
    refining: list[RefiningEngine]
    """Those of the engines that further passes bring something to."""

    @classmethod
    def of(cls, matrices: Sequence[Matrix], *, home: StateHome, seed: int, dtype: torch.dtype) -> EngineGroup:
        """dtype: of the data the engines will see."""
        engines: list[GradientEngine] = []
        engine_of: dict[str, GradientEngine] = {}
        refining: list[RefiningEngine] = []
        for name in dict.fromkeys(matrix.engine for matrix in matrices):
            members = [matrix for matrix in matrices if matrix.engine == name]
            engine = ENGINES[name](members, home=home, seed=seed, dtype=dtype)
            engines.append(engine)
            engine_of |= {matrix.name: engine for matrix in members}
            if ENGINES[name].refines:
                refining.append(cast(RefiningEngine, engine))
        return cls(engines, engine_of, refining)

    def begin_microbatch(self, index: int) -> None:
        for engine in self.engines:
            engine.begin_microbatch(index)

    def observe(self, name: str, x_TN: torch.Tensor, dy_TM: torch.Tensor) -> None:
        self.engine_of[name].observe(name, x_TN, dy_TM)

    def end_microbatch(self, world: Collectives) -> None:
        for engine in self.engines:
            engine.end_microbatch(world)

    def split_half_cosines(self, world: Collectives) -> list[float | None]:
        return [cosine for engine in self.engines for cosine in engine.split_half_cosines(world)]

    def save_state(self, world: Collectives) -> EngineState:
        states = [engine.save_state(world) for engine in self.engines]
        tensors = {name: tensor for state in states for name, tensor in state.tensors.items()}
        return EngineState({"engines": [state.content for state in states]}, tensors)

    def load_state(self, content: dict[str, Any], tensors: Tensors, world: Collectives) -> None:
        for engine, of_engine in zip(self.engines, content["engines"], strict=True):
            engine.load_state(of_engine, tensors, world)

    def factorize(self, world: Collectives, num_tokens: int) -> Iterator[tuple[str, GradientSVD]]:
        for engine in self.engines:
            yield from engine.factorize(world, num_tokens)
