"""From the last block's output to the loss, by some tokens at a time where a microbatch's logits are too many."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from loraga_dist.data.losses import IGNORED, Loss, cross_entropy_sum
from loraga_dist.data.microbatches import Microbatch
from loraga_dist.gradients.stubs import Stubs

LOGITS_AT_ONCE = 2**25
"""Tokens times vocabulary of which logits, their float32 copy, and its gradients are there at a time: 128 MiB each."""

_TOLERANCE = 1e-5
"""Relative, of the loss by stubs to the model's, in float32; lower precisions get their own epsilon."""


class Head:
    """What comes after a model's blocks, and the loss. Its stubs are installed when it is called."""

    def __init__(self, model: nn.Module, stubs: Stubs, loss: Loss) -> None:
        self._config: Any = model.config
        self._stubs = stubs
        self._loss = loss

    def tokens_at_once(self, microbatch: Microbatch) -> int | None:
        """How many of each sequence's logits there is room for; None if for all, or if they are not of tokens."""
        size, length = microbatch.inputs["input_ids"].shape[:2]
        fitting = max(1, LOGITS_AT_ONCE // (size * self._config.get_text_config().vocab_size))
        return fitting if self._loss.by_token and fitting < length else None

    def difference(self, microbatch: Microbatch, hidden: Tensor, logits: Tensor) -> str | None:
        """Say how the loss of these last hidden states is another than that of the model's own logits; None if it is
        not. logits: of as many tokens as there is room for."""
        predicted, parts = self._loss.predicted(microbatch.inputs["labels"]), [hidden]
        if (num_tokens := self.tokens_at_once(microbatch)) is not None:
            predicted = predicted[:, :num_tokens]
            parts = list(hidden[:, :num_tokens].split(-(-num_tokens // 2), dim=1))
        with torch.no_grad():
            found = [self._stubs.leave(microbatch, part) for part in parts]
        by_stubs = torch.cat(found, dim=1) if len(found) > 1 else found[0]
        wanted, by_blocks = (cross_entropy_sum(each, predicted).item() for each in (logits, by_stubs))
        tolerance = max(_TOLERANCE, 4 * torch.finfo(logits.dtype).eps) * max(abs(wanted), 1.0)
        if math.isfinite(wanted) and not abs(by_blocks - wanted) <= tolerance:
            return f"the first loss is {by_blocks:.8g} by blocks and {wanted:.8g} by the model"
        return None

    def backward(self, microbatch: Microbatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a microbatch, a sum over its tokens, and its gradient at the last hidden states."""
        predicted, num_tokens = self._loss.predicted(microbatch.inputs["labels"]), self.tokens_at_once(microbatch)
        if num_tokens is None:
            loss, gradient = self._backward(microbatch, hidden, predicted)
            return loss, gradient
        total, gradient = torch.zeros((), device=hidden.device), torch.zeros_like(hidden)
        for start in range(0, hidden.shape[1], num_tokens):
            part = slice(None), slice(start, start + num_tokens)
            if start == 0 or (predicted[part] != IGNORED).any():
                loss, gradient[part] = self._backward(microbatch, hidden[part], predicted[part])
                total += loss
        return total, gradient

    def _backward(self, microbatch: Microbatch, hidden: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            loss = cross_entropy_sum(self._stubs.leave(microbatch, leaf), predicted)
        loss.backward()
        assert leaf.grad is not None, "the loss depends on the last block"
        return loss.detach(), leaf.grad
