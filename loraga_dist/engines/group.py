"""The engines of one sweep as one: every matrix goes to its own kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraga_dist.engines import ENGINES
from loraga_dist.engines.base import Collectives, EngineState, GradientEngine, GradientSVD, Matrix, Tensors
from loraga_dist.engines.home import StateHome
from loraga_dist.engines.sketch import SketchEngine


@dataclass(frozen=True)
class EngineGroup:
    """A `GradientEngine` made of others, by the name of the matrix."""

    engines: list[GradientEngine]
    engine_of: dict[str, GradientEngine]

    @classmethod
    def of(cls, matrices: Sequence[Matrix], *, home: StateHome, seed: int, dtype: torch.dtype) -> EngineGroup:
        """dtype: of the data the engines will see."""
        engines: list[GradientEngine] = []
        engine_of: dict[str, GradientEngine] = {}
        for kind in dict.fromkeys(matrix.engine for matrix in matrices):
            members = [matrix for matrix in matrices if matrix.engine == kind]
            engines.append(ENGINES[kind].engine(members, home=home, seed=seed, dtype=dtype))
            engine_of |= {matrix.name: engines[-1] for matrix in members}
        return cls(engines, engine_of)

    @property
    def names(self) -> list[str]:
        return list(self.engine_of)

    @property
    def refining(self) -> EngineGroup | None:
        """Those that gain from further passes over the same data, if there are any."""
        engines = [engine for engine in self.engines if isinstance(engine, SketchEngine)]
        engine_of = {name: engine for name, engine in self.engine_of.items() if engine in engines}
        return EngineGroup(list(engines), engine_of) if engines else None

    def begin_refinement(self, world: Collectives) -> None:
        for engine in self.engines:
            assert isinstance(engine, SketchEngine)
            engine.begin_refinement(world)

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
