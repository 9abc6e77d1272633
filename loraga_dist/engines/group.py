"""The engines of one group as one: every matrix goes to its own kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from loraga_dist.engines import ENGINES
from loraga_dist.engines.base import (
    Collectives,
    EngineState,
    Entries,
    GradientEngine,
    GradientSVD,
    Matrix,
    Tensors,
    require_entries,
)
from loraga_dist.engines.home import StateHome
from loraga_dist.engines.white import Whites


@dataclass(frozen=True)
class EngineGroup:
    """Works as one `GradientEngine` does, made of others, each for its own matrices."""

    engine_of: dict[str, GradientEngine]
    """By the name of the matrix."""
    whites: Whites = field(default_factory=lambda: Whites(()))

    device: torch.device = torch.device("cpu")

    @classmethod
    def of(cls, matrices: Sequence[Matrix], *, home: StateHome, seed: int, dtype: torch.dtype) -> EngineGroup:
        """dtype: of the data the engines will see."""
        engines = {}
        for name in dict.fromkeys(matrix.engine for matrix in matrices):
            members = [matrix for matrix in matrices if matrix.engine == name]
            engines[name] = ENGINES[name](members, home=home, seed=seed, dtype=dtype)
        return cls({matrix.name: engines[matrix.engine] for matrix in matrices}, Whites(matrices), home.device)

    @cached_property
    def engines(self) -> list[GradientEngine]:
        return list(dict.fromkeys(self.engine_of.values()))

    @property
    def refining(self) -> EngineGroup | None:
        """Those to which further passes over the same data bring something, if there are any."""
        members = {name: engine for name, engine in self.engine_of.items() if engine.refines}
        return EngineGroup(members, self.whites, self.device) if members else None

    def begin_refinement(self, world: Collectives) -> None:
        for engine in self.engines:
            engine.begin_refinement(world)

    def begin_microbatch(self, index: int) -> None:
        for engine in self.engines:
            engine.begin_microbatch(index)

    def observe(self, name: str, x_TN: torch.Tensor, dy_TM: torch.Tensor) -> None:
        self.engine_of[name].observe(name, self.whites.of(name, x_TN), dy_TM)

    def end_microbatch(self, world: Collectives) -> None:
        self.whites.forget()
        for engine in self.engines:
            engine.end_microbatch(world)

    def split_half_cosines(self, world: Collectives) -> list[float | None]:
        return [cosine for engine in self.engines for cosine in engine.split_half_cosines(world)]

    def save_state(self, world: Collectives) -> EngineState:
        states = [engine.save_state(world) for engine in self.engines]
        tensors = {name: tensor for state in states for name, tensor in state.tensors.items()}
        content = {"engines": [state.content for state in states], "white": self.whites.known}
        return EngineState(content, tensors | self.whites.state(world.rank))

    @staticmethod
    def check_state(matrices: Sequence[Matrix], content: dict[str, Any], saved: Entries) -> None:
        """Raise ValueError, KeyError or TypeError for a saved state that `load_state` could not take.

        saved: the tensors of all matrices of the group.
        """
        names = list(dict.fromkeys(matrix.engine for matrix in matrices))
        of_engine = dict(zip(names, content["engines"], strict=True))
        for matrix in matrices:
            prefix = f"{matrix.name}/"
            own = {name.removeprefix(prefix): entry for name, entry in saved.items() if name.startswith(prefix)}
            ENGINES[matrix.engine].check_state(matrix, of_engine[matrix.engine], own)
            if matrix.input_width is not None and content["white"]:
                require_entries(own, Whites.entries(matrix))

    def load_state(self, content: dict[str, Any], tensors: Tensors, world: Collectives) -> None:
        for engine, of_engine in zip(self.engines, content["engines"], strict=True):
            engine.load_state(of_engine, tensors, world)
        if content["white"]:
            self.whites.load_state(tensors, world, self.device)

    def collect(self, world: Collectives) -> None:
        for engine in self.engines:
            engine.collect(world)

    def results(self, num_tokens: int) -> Iterator[tuple[str, GradientSVD]]:
        for engine in self.engines:
            for name, found in engine.results(num_tokens):
                yield name, self.whites.undo(name, found)

    def factorize(self, world: Collectives, num_tokens: int) -> Iterator[tuple[str, GradientSVD]]:
        self.collect(world)
        yield from self.results(num_tokens)
