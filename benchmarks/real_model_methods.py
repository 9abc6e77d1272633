"""The rows of benchmarks/real_model.py: convergence_methods.py's at any rank, on a bfloat16 base.

Adapters are float32, on every Linear layer but the head; full fine-tuning's AdamW holds float32 weights beside the
model's, which it rounds to bfloat16 after every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from convergence_methods import PLAIN, RANK_STABLE, Method, adamw, full, longer_rows, lora, lora_plus, ours
from torch import nn
from torch.optim import AdamW, Optimizer

from loraga_dist.schemes import SCHEMES


@dataclass(frozen=True, kw_only=True)
class Row(Method):
    """A method, and where its search for a learning rate begins."""

    first_lr: float
    scheme: str | None = None
    """Of `loraga_dist.schemes.SCHEMES`, for starts that are ours."""


def _float32_adamw(model: nn.Module, lr: float) -> Optimizer:
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    copies = [weight.detach().float().clone() for weight in weights]  # updates below a unit in the last place add up
    optimizer = AdamW(copies, lr=lr, weight_decay=0.0)

    def take_gradients(*_: Any) -> None:
        for copy, weight in zip(copies, weights, strict=True):
            copy.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None

    @torch.no_grad()
    def round_weights(*_: Any) -> None:
        for copy, weight in zip(copies, weights, strict=True):
            weight.copy_(copy)

    optimizer.register_step_pre_hook(take_gradients)
    optimizer.register_step_post_hook(round_weights)
    return optimizer


def _ours(label: str, scheme: str, first_lr: float, stable_gamma: float | None = None) -> Row:
    start = ours(scheme, "auto", stable_gamma)
    return Row(label=label, scaling=RANK_STABLE, start=start, optimizer=adamw, first_lr=first_lr, scheme=scheme)


_BEGIN = 0.001
_OWN: dict[str, Row] = {
    "full": Row(label="full fine-tuning", scaling="", start=full, optimizer=_float32_adamw, first_lr=_BEGIN / 16),
    "lora": Row(label="LoRA", scaling=PLAIN, start=lora(), optimizer=adamw, first_lr=_BEGIN * 2),
    "rslora": Row(
        label="rsLoRA", scaling=RANK_STABLE, start=lora(use_rslora=True), optimizer=adamw, first_lr=_BEGIN
    ),
    "lora_plus": Row(label="LoRA+", scaling=PLAIN, start=lora(), optimizer=lora_plus, first_lr=_BEGIN / 4),
    "lora_one": _ours("LoRA-One", "lora_one", _BEGIN),
    "lora_ga": _ours("LoRA-GA", "lora_ga", _BEGIN / 8),
    "lora_ga_gamma_64": _ours("LoRA-GA, γ = 64", "lora_ga", _BEGIN / 4, 64.0),
    "rrr": _ours("RRR", "rrr", _BEGIN),
    "rrr_step": _ours("RRR with a step", "rrr_step", _BEGIN),
}  # fmt: skip


ROWS = _OWN | longer_rows(_OWN)
"""By the name in the results, in the order of work: what needs another row's rate comes after it."""


def missing() -> list[str]:
    """Rows whose scheme this version of loraga_dist does not have."""
    return [name for name, row in ROWS.items() if row.scheme is not None and row.scheme not in SCHEMES]
