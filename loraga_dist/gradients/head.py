"""From the last block's output to the loss, by some tokens at a time where a microbatch's logits are too many."""

from __future__ import annotations

import math
from dataclasses import replace
from types import EllipsisType
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
        if not self._loss.by_token:
            return None
        size, length = microbatch.inputs["input_ids"].shape[:2]
        fitting = max(1, LOGITS_AT_ONCE // (size * self._config.get_text_config().vocab_size))
        return fitting if fitting < length else None

    def difference(self, microbatch: Microbatch, hidden: Tensor, logits: Tensor) -> str | None:
        """Say how the loss of these last hidden states is another than that of the model's own logits; None if it is
        not. logits: of as many tokens as there is room for, or more."""
        predicted, num_tokens = self._loss.predicted(microbatch.inputs["labels"]), self.tokens_at_once(microbatch)
        predicted = predicted.masked_fill(predicted == IGNORED, 0)  # what is not trained on is compared, too
        if num_tokens is None:
            parts = [_EVERYTHING]
        elif not _is_by_token(microbatch, hidden):
            return f"the last gives {tuple(hidden.shape)}, not one hidden state per token of a sequence"
        else:  # in two, of which one does not begin where the sequence does
            predicted, logits = predicted[:, :num_tokens], logits[:, :num_tokens]
            parts = _parts(num_tokens, -(-num_tokens // 2))
        with torch.no_grad():
            by_blocks = sum(
                cross_entropy_sum(self._logits(microbatch, hidden[part], part), predicted[part]).item()
                for part in parts
            )
        wanted = cross_entropy_sum(logits, predicted).item()
        tolerance = max(_TOLERANCE, 4 * torch.finfo(logits.dtype).eps) * max(abs(wanted), 1.0)
        if math.isfinite(wanted) and not abs(by_blocks - wanted) <= tolerance:
            return f"the first loss is {by_blocks:.8g} by blocks and {wanted:.8g} by the model"
        return None

    def backward(self, microbatch: Microbatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a microbatch, a sum over its tokens, and its gradient at the last hidden states."""
        predicted, num_tokens = self._loss.predicted(microbatch.inputs["labels"]), self.tokens_at_once(microbatch)
        total, gradient = torch.zeros((), device=hidden.device), torch.zeros_like(hidden)
        parts: list[Part] = [_EVERYTHING]
        if num_tokens is not None and _is_by_token(microbatch, hidden):
            parts = _parts(hidden.shape[1], num_tokens)
        for index, part in enumerate(parts):
            if index and not (predicted[part] != IGNORED).any():
                continue
            leaf = hidden[part].detach().requires_grad_()
            with torch.enable_grad():
                loss = cross_entropy_sum(self._logits(microbatch, leaf, part), predicted[part], microbatch.weights)
            loss.backward()
            assert leaf.grad is not None, "the loss depends on the last block"
            gradient[part] = leaf.grad
            total += loss.detach()
        return total, gradient

    def _logits(self, microbatch: Microbatch, hidden: Tensor, part: Part) -> Tensor:
        """Of these tokens' hidden states."""
        inputs = microbatch.inputs
        if part is not _EVERYTHING:
            shape = inputs["input_ids"].shape
            inputs = {name: tensor[part] if tensor.shape == shape else tensor for name, tensor in inputs.items()}
        # what images have become is in the hidden states
        return self._stubs.leave(replace(microbatch, inputs=inputs, images=None), hidden)


Part = tuple[slice, slice] | EllipsisType
"""Of sequences and of their tokens."""
_EVERYTHING = ...


def _is_by_token(microbatch: Microbatch, hidden: Tensor) -> bool:
    """Whether hidden states are of sequences and their tokens: Gemma3n's are several each, XLNet's tokens first."""
    return hidden.shape[:2] == microbatch.inputs["input_ids"].shape[:2]


def _parts(length: int, num_tokens: int) -> list[Part]:
    """Sequences by so many tokens at a time."""
    return [(slice(None), slice(start, min(length, start + num_tokens))) for start in range(0, length, num_tokens)]
