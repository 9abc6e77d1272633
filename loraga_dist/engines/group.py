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
)
from loraga_dist.engines.home import StateHome
from loraga_dist.engines.inputs import Inputs


@dataclass(frozen=True)
class EngineGroup:
    """Works as one `GradientEngine` does, made of others, each for its own matrices."""

    engine_of: dict[str, GradientEngine]
    """By the name of the matrix."""
    inputs: Inputs = field(default_factory=Inputs.none)
    """What regressions need beside gradients."""

    @classmethod
    def of(cls, matrices: Sequence[Matrix], *, home: StateHome, seed: int, dtype: torch.dtype) -> EngineGroup:
        """dtype: of the data the engines will see."""
        engines = {}
        for name in dict.fromkeys(matrix.engine for matrix in matrices):
            members = [matrix for matrix in matrices if matrix.engine == name]
            engines[name] = ENGINES[name](members, home=home, seed=seed, dtype=dtype)
        return cls({matrix.name: engines[matrix.engine] for matrix in matrices}, Inputs(matrices, home))

    @cached_property
    def engines(self) -> list[GradientEngine]:
        return list(dict.fromkeys(self.engine_of.values()))

    @property
    def refining(self) -> EngineGroup | None:
        """Those to which further passes over the same data bring something, if there are any."""
        members = {name: engine for name, engine in self.engine_of.items() if engine.refines}
        return EngineGroup(members) if members else None

    def begin_refinement(self, world: Collectives) -> None:
        for engine in self.engines:
            engine.begin_refinement(world)

    def begin_microbatch(self, index: int) -> None:
        for engine in self.engines:
            engine.begin_microbatch(index)

    def observe(self, name: str, x_TN: torch.Tensor, dy_TM: torch.Tensor) -> None:
        self.inputs.observe(name, x_TN, dy_TM)
        self.engine_of[name].observe(name, x_TN, dy_TM)

    def end_microbatch(self, world: Collectives) -> None:
        self.inputs.end_microbatch()
        for engine in self.engines:
            engine.end_microbatch(world)

    def split_half_cosines(self, world: Collectives) -> list[float | None]:
        return [cosine for engine in self.engines for cosine in engine.split_half_cosines(world)]

    def save_state(self, world: Collectives) -> EngineState:
        states = [part.save_state(world) for part in (*self.engines, self.inputs)]
        tensors = {name: tensor for state in states for name, tensor in state.tensors.items()}
        *of_engines, of_inputs = (state.content for state in states)
        return EngineState({"engines": of_engines, "inputs": of_inputs}, tensors)

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
            Inputs.check_state(matrix, content["inputs"], own)

    def load_state(self, content: dict[str, Any], tensors: Tensors, world: Collectives) -> None:
        for engine, of_engine in zip(self.engines, content["engines"], strict=True):
            engine.load_state(of_engine, tensors, world)
        self.inputs.load_state(content["inputs"], tensors, world)

    def collect(self, world: Collectives) -> None:
        for part in (*self.engines, self.inputs):
            part.collect(world)

    def results(self, num_tokens: int, damping: float = 0.0) -> Iterator[tuple[str, GradientSVD]]:
        """damping: of regressions, as `linalg.regression` takes it."""
        for engine in self.engines:
            for name, found in engine.results(num_tokens):
                yield name, self.inputs.regress(name, found, damping)
        self.inputs.forget()
