"""The way of calibration microbatches through a model, and model order: each through the whole model by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loraga_dist.config import Checkpointing
from loraga_dist.data.losses import Loss
from loraga_dist.data.microbatches import Microbatch
from loraga_dist.gradients.experts import Sink
from loraga_dist.gradients.forward import forward
from loraga_dist.gradients.head import Head
from loraga_dist.gradients.stubs import Form, Stubs, short_head, why_not
from loraga_dist.gradients.taps import tapped
from loraga_dist.model.blocks import find_blocks
from loraga_dist.ranks.memory import return_freed_memory
from loraga_dist.sharding.base import Sharding

Take = Callable[[Microbatch], torch.Tensor]
"""Takes one microbatch backward; its loss on this rank, a sum over tokens."""


class Route(ABC):
    """Shows sinks the x and dy of targets for this rank's microbatches. Every rank calls every method alike."""

    @abstractmethod
    def opened(self) -> AbstractContextManager[None]:
        """What holds during a whole calibration; on any exit the model is as it was."""

    @abstractmethod
    def showing(self, chunk: Sequence[Microbatch], names: Sequence[str], sink: Sink) -> AbstractContextManager[Take]:
        """A function to call with every microbatch of the chunk in turn, which shows the sink (x, dy) of these targets.

        names: all of one stage. Further calls with the same chunk cost least for the same stage, or a lower one.
        """


@dataclass
class LongSequences:
    """What takes long sequences through the head in parts; of a model that is a sequence of blocks."""

    last: nn.Module
    stubs: Stubs
    head: Head
    trusted: bool = False
    """It was seen to give the model's own loss."""

    @classmethod
    def of(cls, model: nn.Module, loss: Loss, device: torch.device) -> LongSequences | None:
        found = find_blocks(model)
        if found is None:
            return None
        blocks = found.of(model)
        stubs = Stubs(model, blocks, device)
        return cls(blocks[-1], stubs, Head(model, stubs, loss))

    def gives(self, microbatch: Microbatch, hidden: torch.Tensor, logits: torch.Tensor) -> bool:
        """Whether these last hidden states give the model's own loss in parts, as the head would take them."""
        return why_not(lambda: self.head.difference(microbatch, hidden, logits)) is None


class ModelOrder(Route):
    """Forward and backward of the whole model for one microbatch after the other."""

    def __init__(self, model: nn.Module, loss: Loss, *, sharding: Sharding, checkpointing: Checkpointing) -> None:
        self._model = model
        self._loss = loss
        self._sharding = sharding
        self._checkpointing: Checkpointing = checkpointing
        self._shown: tuple[Sequence[str], Sink] | None = None
        """What the taps are attached for."""
        # ranks that gather by collectives have sequences of other lengths
        self._long = None if sharding.is_sharded else LongSequences.of(model, loss, sharding.world.device)

    @contextmanager
    def opened(self) -> Iterator[None]:
        try:
            self._called = self._sharding.attach(self._model)
            with ExitStack() as self._taps:
                yield
        finally:
            self._shown = None
            self._sharding.detach()

    @contextmanager
    def showing(self, chunk: Sequence[Microbatch], names: Sequence[str], sink: Sink) -> Iterator[Take]:
        # a chunk is one microbatch, and the next one mostly wants the same; a factorized engine holds nothing any more
        if self._shown != (names, sink):
            self._taps.close()
            self._taps.enter_context(tapped(self._called, names, sink, checkpointing=self._checkpointing))
            self._shown = names, sink
        yield self._take

    def _take(self, microbatch: Microbatch) -> torch.Tensor:
        if self._long is not None and self._long.head.tokens_at_once(microbatch) is not None:
            return self._take_long(microbatch, self._long)
        logits = forward(self._called, microbatch, self._sharding.world.device)
        return_freed_memory()  # holes that blocks left; the logits and their loss are often the peak
        loss = self._loss(logits, microbatch.inputs["labels"], microbatch.weights)
        del logits
        if loss.requires_grad:  # else none of the targets took part in this microbatch
            loss.backward()
        self._sharding.release()
        return loss.detach()

    def _take_long(self, microbatch: Microbatch, long: LongSequences) -> torch.Tensor:
        """Of a long sequence: from the last block on by some tokens at a time."""
        kept: list[torch.Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            long.stubs.form = Form.of(output)
            kept.append(long.stubs.form.hidden(output))

        handle = long.last.register_forward_hook(keep)
        try:
            with short_head(self._model, 1 if long.trusted else long.head.tokens_at_once(microbatch)):
                logits = forward(self._called, microbatch, self._sharding.world.device)
        finally:
            handle.remove()
        if not kept:  # it is no sequence of these blocks
            self._long = None
            del logits
            return self._take(microbatch)
        hidden = kept.pop()
        with long.stubs.installed():
            if not long.trusted:
                long.trusted = long.gives(microbatch, hidden.detach(), logits)
                if not long.trusted:  # all at once, then
                    self._long = None
            del logits
            if self._long is not None:
                loss, gradient = long.head.backward(microbatch, hidden.detach())
        if self._long is None:
            del hidden  # and its graph
            return self._take(microbatch)
        if hidden.requires_grad:
            hidden.backward(gradient)
        return loss
