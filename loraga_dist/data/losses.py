"""The training loss per task, as a sum over supervised tokens: the caller divides once, by the global count.

Preference and policy data weigh sequences; at the start that is the gradient of DPO and of GRPO (docs/METHOD.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

IGNORED = -100

DPO_BETA = 0.1
"""TRL's default. It scales the gradient at the start and changes nothing else."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A cross-entropy, summed."""

    shifts: bool
    """Position t predicts label t + 1."""
    by_token: bool
    """Every position has logits and a label of its own."""

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """logits: (..., V). labels: (...), -100 where there is no loss. weights: of each sequence; None: 1."""
        return cross_entropy_sum(logits, self.predicted(labels), weights)

    def predicted(self, labels: torch.Tensor) -> torch.Tensor:
        """What the logits at each position are to predict; -100 for nothing."""
        return F.pad(labels[..., 1:], (0, 1), value=IGNORED) if self.shifts else labels


def cross_entropy_sum(
    logits: torch.Tensor, predicted: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy of logits (B, ..., V) at the classes (B, ...), in float32. weights: (B,) float32; None: 1."""
    reduction = "sum" if weights is None else "none"
    loss = F.cross_entropy(
        logits.flatten(0, -2).float(), predicted.flatten().to(logits.device), ignore_index=IGNORED, reduction=reduction
    )
    return loss if weights is None else loss.view(len(weights), -1).sum(dim=1) @ weights.to(loss.device)


causal_lm = Loss(shifts=True, by_token=True)

LOSSES = {
    "CAUSAL_LM": causal_lm,
    "SEQ_2_SEQ_LM": Loss(shifts=False, by_token=True),  # the decoder's inputs are shifted instead
    "SEQ_CLS": Loss(shifts=False, by_token=False),
}
