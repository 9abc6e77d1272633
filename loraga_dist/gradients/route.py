"""The way of calibration microbatches through a model, and model order: each through the whole model by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from loraga_dist.config import Checkpointing
from loraga_dist.data.losses import Loss
from loraga_dist.data.microbatches import Microbatch
from loraga_dist.gradients.forward import forward, full_float32_matmul
from loraga_dist.gradients.taps import Sink, tapped
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

        names: all of one stage; those of further calls with the same chunk are of the same stage or lower ones.
        """


class ModelOrder(Route):
    """Forward and backward of the whole model for one microbatch after the other."""

    def __init__(self, model: nn.Module, loss: Loss, *, sharding: Sharding, checkpointing: Checkpointing) -> None:
        self._model = model
        self._loss = loss
        self._sharding = sharding
        self._checkpointing: Checkpointing = checkpointing

    @contextmanager
    def opened(self) -> Iterator[None]:
        try:
            self._called = self._sharding.attach(self._model)
            yield
        finally:
            self._sharding.detach()

    @contextmanager
    def showing(self, chunk: Sequence[Microbatch], names: Sequence[str], sink: Sink) -> Iterator[Take]:
        def take(microbatch: Microbatch) -> torch.Tensor:
            logits = forward(self._called, microbatch, self._sharding.world.device)
            return_freed_memory()  # holes that blocks left; the logits and their loss are often the peak
            loss = self._loss(logits, microbatch.inputs["labels"])
            del logits
            loss.backward()
            self._sharding.release()
            return loss.detach()

        with tapped(self._called, names, sink, checkpointing=self._checkpointing), full_float32_matmul():
            yield take
