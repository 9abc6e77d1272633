"""Where engine state lives between two uses: on the device that computes, or in host memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

DEVICE_SHARE = 0.5
"""`auto`: more of the device's free memory than this is not for state; activations need the rest."""


def pinned_bytes(num_bytes: int) -> int:
    """What torch takes of the host to pin a tensor of so many bytes: a power of two."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


@dataclass(frozen=True)
class StateHome:
    """Copies go by the current stream, so that nothing waits: read a tensor that lives here through `fetch` alone."""

    device: torch.device
    on_host: bool = False

    @classmethod
    def choose(
        cls, choice: Literal["auto", "device", "host"], device: torch.device, *, state_bytes: int, free_bytes: int
    ) -> StateHome:
        """`auto` is the device unless `state_bytes` do not fit there. Without an accelerator the two are one.

        free_bytes: of the device.
        """
        if device.type != "cuda" or choice == "device":
            return cls(device)
        return cls(device, on_host=choice == "host" or state_bytes > DEVICE_SHARE * free_bytes)

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, where it lives from now on."""
        if not self.on_host:
            return tensor
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.device.type == "cuda")
        return pinned.copy_(tensor, non_blocking=True)

    def fetch(self, kept: Tensor) -> Tensor:
        """On the device: the tensor itself if it lives there, else a copy."""
        return kept.to(self.device, non_blocking=True)

    def put_back(self, kept: Tensor, fetched: Tensor) -> None:
        """Store what was changed in a fetched tensor."""
        if fetched is not kept:
            kept.copy_(fetched, non_blocking=True)
