"""The training loss per task, as a sum over supervised tokens: the caller divides once, by the global count."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

IGNORED = -100

LossSum = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def causal_lm(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy: position t predicts label t + 1."""
    return cross_entropy_sum(logits_BTV[:, :-1], labels_BT[:, 1:])


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (..., V) at the labels (...): of classes, and of a decoder that shifts labels itself."""
    return F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten().to(logits.device), ignore_index=IGNORED, reduction="sum"
    )


LOSSES: dict[str, LossSum] = {
    "CAUSAL_LM": causal_lm,
    "SEQ_2_SEQ_LM": cross_entropy_sum,
    "SEQ_CLS": cross_entropy_sum,
}
