"""What a model is given of images, beside tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Load = Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class ImageInputs:
    """Of one sample's images; made anew when asked for, as those of all samples would fill the memory."""

    load: Load
    digest: str
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def kind(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Samples of one kind may be in one microbatch."""
        return tuple((name, shape[1:]) for name, shape in self.shapes.items())


def together(parts: Iterable[ImageInputs | None]) -> Load | None:
    """What a model is given of the images of several samples of one kind; None where there are none."""
    of_samples = [part for part in parts if part is not None]
    return partial(_concatenated, of_samples) if of_samples else None


def _concatenated(parts: Iterable[ImageInputs]) -> dict[str, Tensor]:
    loaded = [part.load() for part in parts]
    return {name: torch.cat([tensors[name] for tensors in loaded]) for name in loaded[0]}
