"""The second hand-over: what calibration found of every target's mean gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from loraga_dist.engines.base import GradientSVD, Matrix
from loraga_dist.linalg import TruncatedSVD, numerical_rank
from loraga_dist.model.blocks import Order


@dataclass(frozen=True, kw_only=True)
class GradientFacts:
    """What is known of one target's mean gradient; the same on every rank."""

    singular_values: list[float]
    num_converged: int
    """Leading ones that were asked of the engine; the rest are a by-product."""
    numerical_rank: int
    captured_energy: float
    split_half_cosine: float | None
    subspace_cosine: float | None
    window_capture: float | None
    engine: str
    input_rank: float | None = None
    """Effective rank of the input's second moment, of schemes that whiten."""

    @classmethod
    def of(cls, matrix: Matrix, found: GradientSVD) -> GradientFacts:
        return cls(
            singular_values=found.svd.S_K.tolist(),
            num_converged=matrix.num_triplets,
            numerical_rank=numerical_rank(found.svd.S_K, matrix.M, matrix.N),
            captured_energy=found.captured_energy,
            split_half_cosine=found.split_half_cosine,
            subspace_cosine=found.subspace_cosine,
            window_capture=found.window_capture,
            engine=matrix.engine,
            input_rank=found.input_rank,
        )

    def leading(self, num_triplets: int) -> GradientFacts:
        """The facts of this many leading singular directions, where a start takes no more."""
        captured = self.captured_energy
        if num_triplets != self.num_converged:
            squares = torch.tensor(self.singular_values, dtype=torch.float64).square()
            converged = squares[: self.num_converged].sum().item()
            captured *= squares[:num_triplets].sum().item() / (converged or 1.0)  # an expert may have got no gradient
        return replace(self, singular_values=self.singular_values[:num_triplets], captured_energy=captured)


@dataclass(frozen=True, kw_only=True)
class DataUsed:
    """The part of the calibration data that a calibration took, and what it gave."""

    num_samples: int
    """Fewer than there are only where `reached_target`."""
    reached_target: bool = False
    """The halves of the data agreed before it was at its end."""
    num_supervised_tokens: int = 0
    num_terms: int = 0
    """What loss and gradients are means over: the supervised tokens, of preference data the pairs."""
    mean_loss: float = 0.0
    refine_passes: int = 0


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """The leading singular triplets of every target's mean gradient, each on its owner, and what is known of them."""

    owned: dict[str, TruncatedSVD]
    """Of this rank's targets, float32 on the host."""
    facts: dict[str, GradientFacts]
    """Of all targets, the same on every rank."""
    data: DataUsed
    order: Order
    """In which the model was gone through."""
    num_bytes_read: int
    """By this run, of weights that stay in files."""
    state_bytes_per_rank: int
    """Engine state during the largest sweep; of groups that an earlier run finished, during the largest group."""
